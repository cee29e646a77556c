/* The protocol between a pool and its workers.

docs/explanation/pool-model.md describes this model; tests/model/check.py checks it.

A step of a process is one atomic block. It stands for what one task of the pool or of a worker does
between two of its scheduling points. A worker can be killed between any two of its steps.

Each comment that begins with "check" is one run of spin: its name, its options, and its result. */

/* check faults: -DJOB_COUNT=2 -> holds */
/* check three-jobs: -DCANCELLABLE=1 -DREFUSALS=0 -DCHANGES=0 -> holds */
/* check cancellations: -DCRASHES=0 -DREFUSALS=0 -DCHANGES=0 -> holds */
/* check slots: -DCANCELLABLE=4 -DCRASHES=0 -DREFUSALS=0 -DCHANGES=0 -> holds */
/* check close: -DJOB_COUNT=2 -DCLOSE_EARLY=1 -DREFUSALS=0 -> holds */
/* check no-endless-loop: -DJOB_COUNT=2 -DCLOSE_EARLY=1 -DREFUSALS=0 -DCHANGES=0 -> holds, no cycle */
/* check passing: -DJOB_COUNT=2 -DPASSES=1 -DCANCELLABLE=0 -DREFUSALS=0 -> holds */
/* check passing-refused: -DJOB_COUNT=2 -DPASSES=1 -DCANCELLABLE=1 -DCRASHES=0 -DCHANGES=0 -> holds */
/* check passing-twice: -DJOB_COUNT=2 -DPASSES=2 -DCANCELLABLE=0 -DREFUSALS=0 -DCHANGES=0 -> holds */
/* check passing-close: -DJOB_COUNT=2 -DPASSES=1 -DCLOSE_EARLY=1 -DREFUSALS=0 -DCANCELLABLE=0 -DCHANGES=0 -> holds */

/* The order of the first pool, and what each half of the remedy does alone. */
/* check two-queues: -DTWO_QUEUES -DJOB_COUNT=2 -DCRASHES=0 -DREFUSALS=0 -> fails: crashed[w] */
/* check two-queues-and-refusal: -DTWO_QUEUES -DREFUSE_AFTER_DRAIN -DJOB_COUNT=2 -DCRASHES=0 -DREFUSALS=0 -> holds */
/* check one-queue-without-refusal: -DTAKE_AFTER_DRAIN -DJOB_COUNT=2 -> holds */

/* Faults that spin must find. */
/* check early-handler: -DEARLY_HANDLER -DJOB_COUNT=2 -> fails: assertion violated */
/* check log-unread: -DLOG_UNREAD -DJOB_COUNT=2 -> fails: completion_log */
/* check unread-frames: -DUNREAD_FRAMES -DJOB_COUNT=2 -> fails: assertion violated */
/* check retry-abandoned: -DRETRY_ABANDONED -DJOB_COUNT=2 -> fails: spent */
/* check requeue-acknowledged: -DREQUEUE_ACKNOWLEDGED -DJOB_COUNT=2 -> fails: assertion violated */
/* check refused-forgotten: -DREFUSED_FORGOTTEN -DJOB_COUNT=2 -> fails: invalid end state */
/* check more-lost: -DMORE_LOST -DJOB_COUNT=2 -> fails: invalid end state */
/* check wake-up-kept: -DWAKE_UP_KEPT -DCANCELLABLE=4 -DCRASHES=0 -DCHANGES=0 -DREFUSALS=0 -> fails: invalid end state */
/* check cancel-sent: -DCANCEL_SENT -DJOB_COUNT=2 -> fails: assertion violated */
/* check cancel-forgotten: -DCANCEL_FORGOTTEN -DJOB_COUNT=2 -> fails: invalid end state */
/* check exit-unflushed: -DEXIT_UNFLUSHED -DJOB_COUNT=2 -> fails: crashed[w] */
/* check queue-kept: -DQUEUE_KEPT -DJOB_COUNT=2 -DCLOSE_EARLY=1 -> fails: invalid end state */
/* check put-after-close: -DPUT_AFTER_CLOSE -DJOB_COUNT=2 -DCLOSE_EARLY=1 -> fails: invalid end state */
/* check pass-while-handling: -DPASS_WHILE_HANDLING -DJOB_COUNT=2 -DPASSES=1 -> fails: assertion violated */
/* check pass-unfinished: -DPASS_UNFINISHED -DJOB_COUNT=2 -DPASSES=1 -> fails: invalid end state */
/* check pass-and-done: -DPASS_AND_DONE -DJOB_COUNT=2 -DPASSES=1 -> fails: in_flight[w] */
/* check close-at-pass: -DCLOSE_AT_PASS -DJOB_COUNT=2 -DPASSES=1 -> fails: waiting[w] */
/* check exit-at-pass: -DEXIT_AT_PASS -DJOB_COUNT=2 -DPASSES=1 -> fails: crashed[w] */
/* check give-up-early: -DGIVE_UP_EARLY -DJOB_COUNT=2 -DPASSES=1 -> fails: assertion violated */
/* check verdict-forgotten: -DVERDICT_FORGOTTEN -DJOB_COUNT=2 -DPASSES=1 -> fails: invalid end state */
/* check pass-after-close: -DPASS_AFTER_CLOSE -DJOB_COUNT=2 -DPASSES=1 -DCLOSE_EARLY=1 -> fails: queued==0 */

#ifndef JOB_COUNT
#define JOB_COUNT 3
#endif
#ifndef MAX_QUEUE
#define MAX_QUEUE 1
#endif
#ifndef MAX_IN_FLIGHT
#define MAX_IN_FLIGHT 2
#endif
#ifndef MAX_ATTEMPTS
#define MAX_ATTEMPTS 2
#endif
/* How often a worker is killed, refuses a batch, and is scaled away, in one execution. */
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef REFUSALS
#define REFUSALS 1
#endif
#ifndef CHANGES
#define CHANGES 1
#endif
/* How often a handler passes its connection on, and how often the pool has no file descriptor for
one that was passed on. */
#ifndef PASSES
#define PASSES 0
#endif
#ifndef DROPS
#define DROPS 1
#endif
/* Whether the pool can be closed while jobs are left. */
#ifndef CLOSE_EARLY
#define CLOSE_EARLY 0
#endif
/* Sets of jobs, one bit each. Job 0 is a call; the others are submitted. A server
accepts a connection for the last one between reserving a slot and using it. */
#define CALLS 1
#define ACCEPTED (1 << (JOB_COUNT - 1))
#ifndef CANCELLABLE
#define CANCELLABLE 7
#endif

#define WORKERS 2
#define ALL ((1 << JOB_COUNT) - 1)
/* A connection that was passed on is another job, without a submitter. The first one can be that of
job 1. */
#define TOTAL (JOB_COUNT + PASSES)
#define CONNECTION (2 | (((1 << PASSES) - 1) << JOB_COUNT))
#define BIT(job) (1 << (job))
#define HAS(set, job) (((set) & BIT(job)) != 0)
#define ADD(set, job) set = (set) | BIT(job)
#define REMOVE(set, job) set = (set) & (255 - BIT(job))
#define COUNT(set) (((set) & 1) + (((set) >> 1) & 1) + (((set) >> 2) & 1) + (((set) >> 3) & 1))

/* Frames. */
mtype = { JOBS, CANCEL, DRAIN, TAKEN, REFUSED, MORE, DONE, ANSWER, ERROR };
#if PASSES
/* PASS, and the three verdicts of PASSED: the pool has the connection, had no file descriptor for
it, or has closed it. */
mtype = { PASS, PASSED, RETRY, CLOSED };
#endif
/* What a worker is to its pool. */
mtype = { ABSENT, ACTIVE, DRAINING };
/* Outcomes of submit() and call(). */
mtype = { RECEIPT, ANSWERED, FAILED, DIED, REJECTED, CANCELLED };

/* The pool: where each job is. */
byte queued;
byte batch[WORKERS];
byte in_flight[WORKERS];
byte cancelled;
/* Jobs whose submitters are cancelled, if there is time: the others wait as long as it takes. */
byte impatient;
byte attempts[TOTAL];
/* Jobs whose submitters have an outcome. */
byte settled;
/* Slots of the queue. */
byte reserved;
chan parked = [JOB_COUNT] of { byte };
byte woken;
byte finished_submitters;
/* What the pool knows of its workers. */
mtype status[WORKERS] = ABSENT;
bool wanted[WORKERS] = true;
bool wants_more[WORKERS];
#ifdef MORE_LOST
bool late[WORKERS];
#endif
bool closed;
bool over;

/* The sockets. */
#if PASSES
chan to_worker[WORKERS] = [6] of { mtype, byte };
chan to_pool[WORKERS] = [10] of { mtype, byte };
#else
chan to_worker[WORKERS] = [4] of { mtype, byte };
chan to_pool[WORKERS] = [8] of { mtype, byte };
#endif

/* The workers. */
bool alive[WORKERS];
bool drained[WORKERS];
byte taking[WORKERS];
byte running[WORKERS];
byte unsent[WORKERS];
byte completion_log[WORKERS];
/* Handlers that the pool has cancelled. */
byte told;
/* Whether the handler of the call ends only when it is cancelled. */
bool endless;
bool gone[WORKERS];
bool crashed[WORKERS];
#if PASSES
/* Jobs whose handlers have passed their connections on: PASS is to be sent, or was sent and is not
answered. The worker has its copy of the connection. */
byte passing[WORKERS];
byte waiting[WORKERS];
/* The number of the next job that has no submitter. */
byte next_job = JOB_COUNT;
byte passes = PASSES;
byte drops = DROPS;
#define MADE ((1 << next_job) - 1)
#else
#define MADE ALL
#endif

/* Limits of what goes wrong, and of what is changed. */
byte crashes = CRASHES;
byte refusals = REFUSALS;
byte changes = CHANGES;

/* For the assertions only: jobs whose handlers must not begin (any more), and jobs that were
handled, reported as abandoned, or given back. */
byte spent;
byte ended_jobs;

/* For use within one step, which makes them no part of a state. A breadth-first search cannot have
such variables. */
#ifndef SCRATCH
#define SCRATCH hidden
#endif
SCRATCH byte i;
SCRATCH byte n;
SCRATCH byte set;
SCRATCH mtype kind;

#define FREE_SLOTS (MAX_QUEUE - COUNT(queued) - reserved)

/* ---------------------------------------------------------------- the pool */

#ifdef TWO_QUEUES
/* The order of the first pool: a place for a batch, and a queue for all other frames. */
chan orders[WORKERS] = [4] of { mtype, byte };
bool batch_unsent[WORKERS];
bool sending_orders[WORKERS];
#define send_batch(w) batch_unsent[w] = true
#define send_order(w, what, about) orders[w] ! what, about
#ifndef REFUSE_AFTER_DRAIN
#define TAKE_AFTER_DRAIN
#endif
#else
/* One ordered queue. It and the socket are one queue of the model. */
#define send_batch(w) transmit(w, JOBS, batch[w])
#define send_order(w, what, about) transmit(w, what, about)
#endif

inline transmit(w, what, about) {
  if
  :: alive[w] -> to_worker[w] ! what, about
  :: else -> skip /* the kernel says EPIPE */
  fi
}

/* An outcome is given once. */
inline settle(job, what) {
  printf("submitter %d: %e\n", job, what);
  assert(!HAS(settled, job));
  ADD(settled, job);
  REMOVE(cancelled, job);
  REMOVE(impatient, job);
  attempts[job] = 0
}

/* A job that ends so was not handled, and is not handled later. */
inline give_back(job, what) {
  settle(job, what);
  assert(!HAS(spent, job));
  ADD(spent, job);
  end_job(job)
}

/* A job ends once. */
inline end_job(job) {
  assert(!HAS(ended_jobs, job));
  ADD(ended_jobs, job)
}

inline wake_submitters() {
  n = (FREE_SLOTS > 0 -> FREE_SLOTS : 0);
  do
  :: n > 0 && len(parked) > 0 -> parked ? i; ADD(woken, i); n--
  :: else -> break
  od
}

/* Jobs that a worker did not acknowledge go to another one. */
inline take_back(w, counted) {
  i = 0;
  do
  :: i < TOTAL ->
    if
    :: HAS(batch[w], i) ->
      attempts[i] = attempts[i] + counted;
      if
      :: HAS(cancelled, i) -> give_back(i, CANCELLED)
      :: !HAS(cancelled, i) && (over || attempts[i] >= MAX_ATTEMPTS) -> give_back(i, REJECTED)
      :: else -> ADD(queued, i)
      fi
    :: else -> skip
    fi;
    i++
  :: else -> break
  od;
  batch[w] = 0
}

inline start_worker(w) {
  status[w] = ACTIVE;
  alive[w] = true;
  wants_more[w] = true;
  crashed[w] = false;
  gone[w] = false
}

inline drain_worker(w) {
  printf("pool: DRAIN for worker %d\n", w);
  status[w] = DRAINING;
  send_order(w, DRAIN, 0)
}

inline on_taken(w) {
  assert(batch[w] != 0);
  i = 0;
  do
  :: i < TOTAL ->
    if
    :: HAS(batch[w], i) && !HAS(CALLS, i) -> settle(i, RECEIPT)
    :: HAS(batch[w], i) && HAS(CALLS, i) && HAS(cancelled, i) ->
#ifndef CANCEL_FORGOTTEN
      printf("pool: CANCEL of job %d for worker %d\n", i, w);
      send_order(w, CANCEL, BIT(i))
#else
      skip
#endif
    :: else -> skip
    fi;
    i++
  :: else -> break
  od;
  in_flight[w] = in_flight[w] | batch[w];
  batch[w] = 0
}

inline on_result(w, what, job) {
  assert(HAS(in_flight[w], job));
  REMOVE(in_flight[w], job);
  REMOVE(completion_log[w], job);
  end_job(job);
  if
  :: HAS(CALLS, job) && what == ANSWER -> settle(job, ANSWERED)
  :: HAS(CALLS, job) && what == ERROR -> settle(job, FAILED)
  :: else -> assert(what == DONE)
  fi
}

#if PASSES
/* The next handler's job begins in the step in which the last one's ends. */
inline on_pass(w, job) {
  assert(HAS(in_flight[w], job));
  if
  :: drops > 0 ->
    /* The worker has the only copy, or has died with it. */
    printf("pool: no file descriptor for the connection of job %d\n", job);
    drops--;
    send_order(w, RETRY, job)
  :: true ->
#ifndef PASS_UNFINISHED
    REMOVE(in_flight[w], job);
#endif
    end_job(job);
    if
#ifndef PASS_AFTER_CLOSE
    :: closed -> send_order(w, CLOSED, job)
    :: !closed ->
#else
    ::
#endif
      printf("pool: the connection of job %d is job %d\n", job, next_job);
      ADD(queued, next_job);
      next_job++;
#ifndef VERDICT_FORGOTTEN
      send_order(w, PASSED, job)
#endif
    fi
  fi
}
#endif

/* The process has ended, and all that it has sent was read. */
inline on_exit(w) {
#ifdef REQUEUE_ACKNOWLEDGED
  batch[w] = batch[w] | (in_flight[w] & (255 - completion_log[w]));
  in_flight[w] = in_flight[w] & completion_log[w];
#endif
  take_back(w, 1);
  i = 0;
  do
  :: i < TOTAL ->
    if
    :: HAS(in_flight[w], i) ->
      /* A worker that was drained has lost nothing. */
      assert(crashed[w]);
      end_job(i);
      if
#ifdef LOG_UNREAD
      :: true ->
#else
      :: HAS(completion_log[w], i) -> skip
      :: else ->
#endif
        printf("pool: job %d was abandoned\n", i);
        /* Its handler has not ended. */
        assert(!HAS(completion_log[w], i));
#ifdef RETRY_ABANDONED
        ADD(queued, i);
#endif
        ADD(spent, i)
      fi;
      if
      :: HAS(CALLS, i) -> settle(i, DIED)
      :: else -> skip
      fi
    :: else -> skip
    fi;
    i++
  :: else -> break
  od;
  in_flight[w] = 0;
  completion_log[w] = 0;
  wants_more[w] = false;
  gone[w] = false;
  crashed[w] = false;
#ifdef UNREAD_FRAMES
  do
  :: len(to_pool[w]) > 0 -> to_pool[w] ? kind, set
  :: else -> break
  od;
#endif
#ifdef TWO_QUEUES
  do
  :: len(orders[w]) > 0 -> orders[w] ? kind, set
  :: else -> break
  od;
  batch_unsent[w] = false;
  sending_orders[w] = false;
#endif
  status[w] = ABSENT
}

#ifdef UNREAD_FRAMES
#define ALL_WAS_READ(w) true
#else
#define ALL_WAS_READ(w) len(to_pool[w]) == 0
#endif

/* What the pool does for one worker. */
proctype handle(byte w) {
  do
  :: atomic { status[w] == ABSENT && wanted[w] && !over ->
      printf("pool: start worker %d\n", w);
      start_worker(w)
    }
  :: atomic { status[w] == ACTIVE && wants_more[w] && batch[w] == 0 && queued != 0 &&
      COUNT(in_flight[w]) < MAX_IN_FLIGHT ->
      /* Any job, and perhaps another one: whatever the policy of the queue. */
      if
      :: HAS(queued, 0) -> batch[w] = BIT(0)
      :: HAS(queued, 1) -> batch[w] = BIT(1)
#if TOTAL > 2
      :: HAS(queued, 2) -> batch[w] = BIT(2)
#endif
#if TOTAL > 3
      :: HAS(queued, 3) -> batch[w] = BIT(3)
#endif
      :: COUNT(queued) > 1 -> batch[w] = queued
      fi;
      queued = queued & (255 - batch[w]);
#ifdef MORE_LOST
      late[w] = true;
#else
      wants_more[w] = false;
#endif
      printf("pool: JOBS {%d} for worker %d\n", batch[w], w);
      send_batch(w);
      wake_submitters()
    }
#ifdef MORE_LOST
  :: atomic { late[w] -> late[w] = false; wants_more[w] = false }
#endif
  :: atomic { len(to_pool[w]) > 0 -> to_pool[w] ? kind, set;
      printf("pool: worker %d said %e {%d}\n", w, kind, set);
      if
      :: kind == TAKEN -> on_taken(w)
      :: kind == REFUSED ->
        assert(batch[w] != 0);
#ifdef REFUSED_FORGOTTEN
        batch[w] = 0;
#else
        take_back(w, set);
#endif
        wants_more[w] = true
      :: kind == MORE -> wants_more[w] = true
#if PASSES
      :: kind == PASS -> on_pass(w, set)
#endif
      :: else -> on_result(w, kind, set)
      fi
    }
  :: atomic { gone[w] && ALL_WAS_READ(w) ->
      printf("pool: worker %d has ended\n", w);
      on_exit(w)
    }
  :: atomic { over && status[w] == ABSENT -> break }
  od
}

#ifdef TWO_QUEUES
/* A task for each worker. It sends a batch first, then orders until there are none. */
proctype sender(byte w) {
end:
  do
  :: atomic { !sending_orders[w] && batch_unsent[w] ->
      batch_unsent[w] = false;
      printf("pool: send JOBS {%d} to worker %d\n", batch[w], w);
      transmit(w, JOBS, batch[w])
    }
  :: atomic { len(orders[w]) > 0 && (sending_orders[w] || !batch_unsent[w]) ->
      orders[w] ? kind, set;
      sending_orders[w] = true;
      printf("pool: send %e to worker %d\n", kind, w);
      transmit(w, kind, set)
    }
  :: atomic { sending_orders[w] && len(orders[w]) == 0 -> sending_orders[w] = false }
  od
}
#endif

#define ALL_IS_DONE \
  (finished_submitters == ALL && queued == 0 && in_flight[0] == 0 && in_flight[1] == 0)

/* What changes the pool as a whole. */
proctype supervisor() {
  byte w;
  do
  :: atomic { changes > 0 && !over && status[0] == ACTIVE && status[1] == ACTIVE ->
      changes--;
      if
      :: w = 0
      :: w = 1
      fi;
      printf("scale: worker %d is to leave\n", w);
      wanted[w] = false;
      drain_worker(w);
      w = 0
    }
  :: atomic { !over && (!wanted[0] || !wanted[1]) && !closed ->
      printf("scale: two workers again\n");
      wanted[0] = true;
      wanted[1] = true
    }
  :: atomic { !closed && (CLOSE_EARLY || ALL_IS_DONE) ->
      printf("pool: no more jobs\n");
      closed = true;
      do
      :: len(parked) > 0 -> parked ? i; ADD(woken, i)
      :: else -> break
      od
    }
  :: atomic { closed && !over && (CLOSE_EARLY || (queued == 0 && batch[0] == 0 && batch[1] == 0)) ->
      /* If jobs are left, drain_timeout is over. */
      over = true;
#ifndef QUEUE_KEPT
      i = 0;
      do
      :: i < TOTAL ->
        if
        :: HAS(queued, i) -> give_back(i, REJECTED)
        :: else -> skip
        fi;
        i++
      :: else -> break
      od;
      queued = 0;
#endif
      do
      :: w < WORKERS ->
        if
        :: status[w] == ACTIVE -> drain_worker(w)
        :: else -> skip
        fi;
        w++
      :: else -> w = 0; break
      od;
      break
    }
  od;
  atomic { status[0] == ABSENT && status[1] == ABSENT && finished_submitters == ALL ->
    /* Nothing is left. */
    assert(queued == 0 && reserved == 0 && woken == 0 && len(parked) == 0);
    assert(settled == MADE && spent == MADE && ended_jobs == MADE)
  }
}

/* ---------------------------------------------------------------- submitters */

proctype submitter(byte job) {
reserve:
  atomic {
    if
    :: closed -> give_back(job, REJECTED); goto done
    :: !closed && FREE_SLOTS > 0 && HAS(ACCEPTED, job) -> reserved++; goto put
    :: !closed && FREE_SLOTS > 0 && !HAS(ACCEPTED, job) -> ADD(queued, job); goto wait
    :: else -> parked ! job
    fi
  };
  atomic {
    if
    :: HAS(woken, job) -> goto wakened
    :: !HAS(woken, job) && HAS(impatient, job) ->
      printf("submitter %d: cancelled while it waits for a slot\n", job);
      parked ?? eval(job);
      give_back(job, CANCELLED);
      goto done
    fi
  };
wakened:
  atomic {
    REMOVE(woken, job);
    if
    :: goto reserve
    :: HAS(impatient, job) ->
      printf("submitter %d: woken, and does not use the slot\n", job);
      give_back(job, CANCELLED);
#ifndef WAKE_UP_KEPT
      wake_submitters();
#endif
      goto done
    fi
  };
put:
  /* A server accepts a connection here, and its policy may deny it. */
  atomic {
    reserved--;
    if
#ifndef PUT_AFTER_CLOSE
    :: closed -> give_back(job, REJECTED); goto done
    :: !closed ->
#else
    ::
#endif
      printf("submitter %d: put\n", job);
      ADD(queued, job)
    :: HAS(impatient, job) ->
      printf("submitter %d: cancelled, releases its slot\n", job);
      give_back(job, CANCELLED);
      wake_submitters();
      goto done
    fi
  };
wait:
  do
  :: atomic { HAS(settled, job) -> break }
  :: atomic { !HAS(settled, job) && HAS(impatient, job) ->
      printf("submitter %d: cancelled\n", job);
      ADD(cancelled, job);
      REMOVE(impatient, job);
      if
      :: HAS(queued, job) ->
        REMOVE(queued, job);
        give_back(job, CANCELLED);
        wake_submitters()
      :: HAS(in_flight[0], job) -> send_order(0, CANCEL, BIT(job))
      :: HAS(in_flight[1], job) -> send_order(1, CANCEL, BIT(job))
      :: else ->
        /* A worker was sent it, and has not answered. */
#ifdef CANCEL_SENT
        give_back(job, CANCELLED)
#else
        skip
#endif
      fi
    }
  od;
done:
  ADD(finished_submitters, job)
}

/* ---------------------------------------------------------------- a worker */

inline leave(w) {
  alive[w] = false;
  drained[w] = false;
  taking[w] = 0;
  running[w] = 0;
  unsent[w] = 0;
#if PASSES
  passing[w] = 0;
  waiting[w] = 0;
#endif
  do
  :: len(to_worker[w]) > 0 -> to_worker[w] ? kind, set
  :: else -> break
  od;
  gone[w] = true
}

inline begin(w) {
  /* No handler begins twice, and none of a job that was cancelled or rejected. */
  assert((spent & taking[w]) == 0);
  spent = spent | taking[w];
  running[w] = running[w] | taking[w];
#if PASSES
  /* A connection has one handler at a time. */
  assert(COUNT(CONNECTION & (running[0] | running[1])) <= 1)
#endif
}

#define HANDLER_ENDS(w, job) \
  atomic { HAS(running[w], job) && (!HAS(CALLS, job) || !endless || HAS(told, job)) -> \
    printf("worker %d: handler of job %d ends\n", w, job); \
    REMOVE(running[w], job); \
    REMOVE(told, job); \
    ADD(completion_log[w], job); \
    ADD(unsent[w], job) \
  }

/* A call is answered, or its handler has raised. */
#define RESULT_IS_SENT(w, job) \
  atomic { HAS(unsent[w], job) -> \
    REMOVE(unsent[w], job); \
    if \
    :: !HAS(CALLS, job) -> to_pool[w] ! DONE, job \
    :: HAS(CALLS, job) && !endless -> to_pool[w] ! ANSWER, job \
    :: HAS(CALLS, job) -> to_pool[w] ! ERROR, job \
    fi \
  }

#if PASSES
#define HANDLER_PASSES(w, job) \
  atomic { passes > 0 && HAS(running[w], job) -> \
    printf("worker %d: handler of job %d passes its connection on\n", w, job); \
    passes--; \
    HANDLER_RETURNS(w, job); \
    ADD(passing[w], job) \
  }

#ifdef PASS_WHILE_HANDLING
#define HANDLER_RETURNS(w, job) skip
#else
#define HANDLER_RETURNS(w, job) REMOVE(running[w], job)
#endif
#ifdef CLOSE_AT_PASS
#define KEEP_CONNECTION(w, job) skip
#else
#define KEEP_CONNECTION(w, job) ADD(waiting[w], job)
#endif
#ifdef PASS_AND_DONE
#define FINISH_PASSED(w, job) ADD(unsent[w], job)
#else
#define FINISH_PASSED(w, job) skip
#endif

#define PASS_IS_SENT(w, job) \
  atomic { HAS(passing[w], job) -> \
    REMOVE(passing[w], job); \
    to_pool[w] ! PASS, job; \
    KEEP_CONNECTION(w, job); \
    FINISH_PASSED(w, job) \
  }

#ifdef GIVE_UP_EARLY
#define CAN_GIVE_UP(w, job) HAS(passing[w] | waiting[w], job)
#else
#define CAN_GIVE_UP(w, job) HAS(passing[w], job)
#endif
/* It takes too long. The worker closes the connection instead. */
#define PASS_IS_GIVEN_UP(w, job) \
  atomic { CAN_GIVE_UP(w, job) -> \
    printf("worker %d: closes the connection of job %d\n", w, job); \
    REMOVE(passing[w], job); \
    REMOVE(waiting[w], job); \
    ADD(completion_log[w], job); \
    ADD(unsent[w], job) \
  }

#endif

#if PASSES && !defined(EXIT_AT_PASS)
#define NONE_IS_PASSING(w) (passing[w] | waiting[w]) == 0
#elif PASSES
#define NONE_IS_PASSING(w) passing[w] == 0
#else
#define NONE_IS_PASSING(w) true
#endif

#ifdef EXIT_UNFLUSHED
#define ALL_WAS_SENT(w) true
#else
#define ALL_WAS_SENT(w) unsent[w] == 0
#endif

proctype worker(byte w) {
end:
  do
  /* Receive one frame. The task that receives starts handlers before it receives again. */
  :: atomic { taking[w] == 0 && len(to_worker[w]) > 0 ->
      to_worker[w] ? kind, set;
      if
      :: kind == DRAIN -> drained[w] = true
      :: kind == CANCEL -> told = told | set
#ifndef TAKE_AFTER_DRAIN
      :: kind == JOBS && drained[w] -> to_pool[w] ! REFUSED, 0 /* never: the queue is ordered */
      :: kind == JOBS && !drained[w] ->
#else
      :: kind == JOBS ->
#endif
        printf("worker %d: takes {%d}\n", w, set);
        taking[w] = set;
#ifdef EARLY_HANDLER
        begin(w)
#else
        to_pool[w] ! TAKEN, 0
#endif
#if PASSES
      :: kind == PASSED || kind == CLOSED -> REMOVE(waiting[w], set)
      :: kind == RETRY ->
        assert(HAS(waiting[w], set));
        REMOVE(waiting[w], set);
        ADD(passing[w], set)
#endif
      /* No file descriptor is free. */
      :: kind == JOBS && refusals > 0 -> refusals--; to_pool[w] ! REFUSED, 1
      fi;
      set = 0
    }
  :: atomic { taking[w] != 0 ->
      printf("worker %d: handlers of {%d} begin\n", w, taking[w]);
#ifdef EARLY_HANDLER
      to_pool[w] ! TAKEN, 0;
#else
      begin(w);
#endif
      taking[w] = 0;
      to_pool[w] ! MORE, 0
    }
  :: HANDLER_ENDS(w, 0)
  :: HANDLER_ENDS(w, 1)
#if TOTAL > 2
  :: HANDLER_ENDS(w, 2)
#endif
#if TOTAL > 3
  :: HANDLER_ENDS(w, 3)
#endif
  :: RESULT_IS_SENT(w, 0)
  :: RESULT_IS_SENT(w, 1)
#if TOTAL > 2
  :: RESULT_IS_SENT(w, 2)
#endif
#if TOTAL > 3
  :: RESULT_IS_SENT(w, 3)
#endif
#if PASSES
  :: HANDLER_PASSES(w, 1)
  :: PASS_IS_SENT(w, 1)
  :: PASS_IS_GIVEN_UP(w, 1)
#endif
#if PASSES > 1
  :: HANDLER_PASSES(w, JOB_COUNT)
  :: PASS_IS_SENT(w, JOB_COUNT)
  :: PASS_IS_GIVEN_UP(w, JOB_COUNT)
#endif
  /* The main task of a worker that was drained waits for the handlers, and for nothing else. */
  :: atomic { drained[w] && running[w] == 0 && NONE_IS_PASSING(w) && ALL_WAS_SENT(w) ->
      printf("worker %d: exits\n", w);
      leave(w)
    }
  :: atomic { alive[w] && crashes > 0 ->
      printf("worker %d: killed\n", w);
      crashes--;
      crashed[w] = true;
      leave(w)
    }
  od
}

init {
  atomic {
    if
    :: impatient = 0
    :: impatient = CANCELLABLE & ALL
    :: impatient = CANCELLABLE & 1
    :: impatient = CANCELLABLE & ALL & 6
    fi;
    if
    :: endless = false
    :: HAS(impatient, 0) -> endless = true
    fi;
    run supervisor();
    run handle(0);
    run handle(1);
#ifdef TWO_QUEUES
    run sender(0);
    run sender(1);
#endif
    run worker(0);
    run worker(1);
    run submitter(0);
    run submitter(1)
#if JOB_COUNT > 2
    ;
    run submitter(2)
#endif
  }
}
