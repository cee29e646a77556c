/* Connections that handlers pass on from a pool to the next generation.

docs/explanation/how-a-handover-works.md describes the way; tests/model/check.py checks this model.
The pool of tests/model/pool.pml drains and has closed its queue, so that no other worker of it gets
a connection; the handover of tests/model/handover.pml is over.

    worker --PASS--> pool --PASSED--> successor
           <-TAKEN--      <-KEPT-----
           or RETRY       or REFUSED: the process had no free file descriptor, and the kernel has
           or CLOSED      dropped its duplicate

A step of a process is one atomic block. Any process can be killed between any two steps. What it
has sent is read after its death, and then the end of its channel.

Each comment that begins with "check" is one run of spin: its name, its options, and its result. */

/* check generations: -DCRASHES=3 -DDROPS=2 -DENDS=1 -> holds */
/* check no-endless-loop: -DCRASHES=1 -DDROPS=1 -DENDS=1 -> holds, no cycle */

/* Faults that spin must find. */
/* check worker-closes-when-sent: -DWORKER_CLOSES_WHEN_SENT -> fails: unaccounted */
/* check pool-closes-when-sent: -DPOOL_CLOSES_WHEN_SENT -> fails: unaccounted */
/* check taken-unasked: -DTAKEN_UNASKED -> fails: unaccounted */
/* check queued-forgotten: -DQUEUED_FORGOTTEN -> fails: unaccounted */
/* check kept-before-stored: -DKEPT_BEFORE_STORED -> fails: unaccounted */
/* check worker-goes-on: -DWORKER_GOES_ON -> fails: owners */
/* check used-while-asked: -DUSED_WHILE_ASKED -> fails: owners */
/* check retry-after-taken: -DRETRY_AFTER_TAKEN -> fails: was_there */
/* check sent-is-given-back: -DSENT_IS_GIVEN_BACK -DENDS=1 -> fails: owners */

#ifndef JOBS
#define JOBS 2
#endif
/* How often a process is killed, the kernel drops a duplicate, and the pool ends the channel to a
successor that lives, as at the deadline of the drain, in one execution. */
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef DROPS
#define DROPS 1
#endif
#ifndef ENDS
#define ENDS 0
#endif

#define ALL ((1 << JOBS) - 1)
#define BIT(c) (1 << (c))
#define HAS(set, c) (((set) & BIT(c)) != 0)
#define ADD(set, c) set = (set) | BIT(c)
#define REMOVE(set, c) set = (set) & (255 - BIT(c))
#define PICK(set) (HAS(set, 0) -> 0 : 1)

#define WORKER 0
#define POOL 1
#define NEXT 2

mtype = { PASS, TAKEN, RETRY, CLOSED, PASSED, KEPT, REFUSED };

chan to_pool = [JOBS] of { mtype, byte };
chan to_worker = [JOBS] of { mtype, byte };
chan outgoing = [JOBS] of { mtype, byte };
chan to_next = [JOBS] of { mtype, byte };
chan from_next = [JOBS] of { mtype, byte };

bool alive[3] = true;
bool was_killed;
/* Whether the pool has ended its side of the channel to the successor. */
bool is_over;

/* Connections that handlers use, here and in the successor. */
byte used_here = ALL;
byte used_there;
/* The worker's copies of those whose handler has returned: to be sent, and sent to the pool. */
byte returned, asked;
/* The pool's: jobs of the worker, and connections queued for the successor, or sent to it. */
byte jobs = ALL;
byte queued, sent;
/* For the assertions: those that the pool has reported as closed; that the successor has had. */
byte closed, was_there;

/* What can still go wrong. */
byte crashes = CRASHES;
byte drops = DROPS;
byte ends = ENDS;

hidden byte owners, unaccounted;

/* No connection is used in two processes. */
inline check_owners() {
  owners = used_here & used_there;
  assert(owners == 0)
}

inline be_killed(me) {
  printf("process %d is killed\n", me);
  crashes--;
  was_killed = true;
  alive[me] = false
}

/* ---------------------------------------------------------------- a worker of the pool */

proctype worker() {
  mtype frame;
  byte c;
end:
  do
  :: atomic { alive[WORKER] && (used_here & (255 - (returned | asked))) != 0 ->
      c = PICK(used_here & (255 - (returned | asked)));
      printf("worker: a handler passes connection %d on\n", c);
#ifndef USED_WHILE_ASKED
      REMOVE(used_here, c);
#endif
      ADD(returned, c)
    }
  :: atomic { alive[WORKER] && alive[POOL] && returned != 0 ->
      c = PICK(returned);
      REMOVE(returned, c);
      to_pool ! PASS, c;
#ifndef WORKER_CLOSES_WHEN_SENT
      ADD(asked, c)
#endif
    }
  :: atomic { alive[WORKER] && nempty(to_worker) ->
      to_worker ? frame, c;
      printf("worker: %e for connection %d\n", frame, c);
      if
      :: frame == RETRY -> returned = returned | (asked & BIT(c))
      :: else -> skip
      fi;
      REMOVE(asked, c)
    }
  :: atomic { alive[WORKER] && !alive[POOL] && empty(to_worker) && (asked | returned) != 0 ->
      printf("worker: the pool has ended\n");
#ifdef WORKER_GOES_ON
      used_here = used_here | asked;
      check_owners();
#endif
      asked = 0;
      returned = 0
    }
  :: atomic { alive[WORKER] && crashes > 0 ->
      be_killed(WORKER);
      used_here = 0;
      returned = 0;
      asked = 0
    }
  od
}

/* ---------------------------------------------------------------- the pool that drains */

/* Said a step later. Meanwhile the successor may have the connection, and the pool die. */
inline answer(verdict) {
  outgoing ! verdict, c
}

/* No task waits for a connection of a pool: what the successor has not taken is closed. */
inline end_channel() {
  is_over = true;
#ifndef QUEUED_FORGOTTEN
  closed = closed | queued;
#endif
  queued = 0;
#ifdef SENT_IS_GIVEN_BACK
  used_here = used_here | sent;
  check_owners();
#endif
  closed = closed | sent;
  sent = 0
}

proctype pool() {
  mtype frame;
  byte c;
end:
  do
  :: atomic { alive[POOL] && nempty(to_pool) ->
      to_pool ? frame, c;
      if
      :: drops > 0 ->
        printf("pool: no free file descriptor for connection %d\n", c);
        drops--;
        answer(RETRY)
      :: is_over ->
        REMOVE(jobs, c);
#ifdef TAKEN_UNASKED
        answer(TAKEN)
#else
        ADD(closed, c);
        answer(CLOSED)
#endif
      :: !is_over ->
        printf("pool: takes connection %d\n", c);
        ADD(queued, c);
#ifdef RETRY_AFTER_TAKEN
        answer(RETRY)
#else
        REMOVE(jobs, c);
        answer(TAKEN)
#endif
      fi
    }
  :: atomic { alive[POOL] && nempty(outgoing) ->
      outgoing ? frame, c;
      if
      :: alive[WORKER] -> to_worker ! frame, c
      :: else -> skip /* the kernel says EPIPE */
      fi
    }
  /* The worker has died, and what it has sent was read. */
  :: atomic { alive[POOL] && !alive[WORKER] && empty(to_pool) && jobs != 0 ->
      printf("pool: jobs {%d} were abandoned\n", jobs);
      closed = closed | jobs;
      jobs = 0
    }
  :: atomic { alive[POOL] && !is_over && queued != 0 && alive[NEXT] ->
      c = PICK(queued);
      printf("pool: sends connection %d\n", c);
      REMOVE(queued, c);
      to_next ! PASSED, c;
#ifndef POOL_CLOSES_WHEN_SENT
      ADD(sent, c)
#endif
    }
  :: atomic { alive[POOL] && !is_over && nempty(from_next) ->
      from_next ? frame, c;
      printf("pool: %e for connection %d\n", frame, c);
      if
      :: frame == REFUSED -> queued = queued | (sent & BIT(c))
      :: else -> skip
      fi;
      REMOVE(sent, c)
    }
  :: atomic { alive[POOL] && !is_over && !alive[NEXT] && empty(from_next) ->
      printf("pool: the successor has ended\n");
      end_channel()
    }
  :: atomic { alive[POOL] && !is_over && ends > 0 ->
      printf("pool: ends the channel\n");
      ends--;
      end_channel()
    }
  :: atomic { alive[POOL] && crashes > 0 ->
      be_killed(POOL);
      queued = 0;
      sent = 0
    }
  od
}

/* ---------------------------------------------------------------- the successor */

inline tell(frame) {
  if
  :: alive[POOL] && !is_over -> from_next ! frame, what
  :: else -> skip /* the kernel says EPIPE */
  fi
}

inline store() {
  assert(!HAS(was_there, what));
  ADD(was_there, what);
  ADD(used_there, what);
  check_owners()
}

proctype next() {
  byte what;
  bool is_unanswered;
end:
  do
  :: atomic { alive[NEXT] && nempty(to_next) && !is_unanswered ->
      to_next ? _, what;
      if
      :: drops > 0 ->
        printf("next: no free file descriptor for connection %d\n", what);
        drops--;
        tell(REFUSED)
      :: true ->
        printf("next: has connection %d\n", what);
        is_unanswered = true;
#ifdef KEPT_BEFORE_STORED
        tell(KEPT)
#else
        store()
#endif
      fi
    }
  :: atomic { alive[NEXT] && is_unanswered ->
      is_unanswered = false;
#ifdef KEPT_BEFORE_STORED
      store()
#else
      tell(KEPT)
#endif
    }
  :: atomic { alive[NEXT] && crashes > 0 -> be_killed(NEXT); used_there = 0 }
  od
}

/* When nothing happens any more. */
inline check_end() {
  /* The pool knows of each connection where it went, and holds none. */
  unaccounted = ALL & (255 - (was_there | closed));
  assert(!alive[POOL] || unaccounted == 0);
  assert(!alive[POOL] || (jobs | queued | sent) == 0);
  assert(!alive[WORKER] || (used_here | returned | asked) == 0);
  /* Nothing is closed needlessly. */
  assert(was_killed || is_over || used_there == ALL)
}

init {
  atomic { run worker(); run pool(); run next() };
  /* Nothing goes wrong any more. */
  atomic { crashes = 0; drops = 0; ends = 0 };
  atomic { timeout -> check_end() }
}
