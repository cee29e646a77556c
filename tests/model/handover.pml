/* The protocol between the generations of a server.

docs/explanation/how-a-handover-works.md describes this model; tests/model/check.py checks it.

A step of a process is one atomic block: what a task does between two of its scheduling points.
Any process can be killed between any two steps. Frames that it has sent are read after its death,
and then the end of its channel.

Each comment that begins with "check" is one run of spin: its name, its options, and its result. */

/* check handover: -DPASSES=2 -DCRASHES=3 -DABORTS=2 -> holds */
/* check passing: -DTAKERS=1 -DPASSES=2 -DCRASHES=2 -DCANCELS=2 -> holds */
/* check third: -DPASSES=0 -DCRASHES=3 -DABORTS=2 -> holds */
/* check no-endless-loop: -DPASSES=1 -DCRASHES=2 -> holds, no cycle */

/* Faults that spin must find. */
/* check stop-at-commit: -DSTOP_AT_COMMIT -DPASSES=0 -> fails: accepts[0] */
/* check release-at-once: -DRELEASE_AT_ONCE -DPASSES=0 -> fails: accepts[0] */
/* check serve-early: -DSERVE_EARLY -DPASSES=0 -> fails: committed[me] */
/* check abort-unsaid: -DABORT_UNSAID -DPASSES=0 -> fails: services */
/* check abort-unread: -DABORT_UNREAD -DPASSES=0 -> fails: services */
/* check no-return: -DNO_RETURN -DPASSES=0 -> fails: accepts[0] */
/* check listeners-closed-early: -DLISTENERS_CLOSED_EARLY -DPASSES=0 -> fails: has[0] */
/* check orphan-exits: -DORPHAN_EXITS -DPASSES=0 -> fails: services */
/* check third-is-served: -DTHIRD_IS_SERVED -DPASSES=0 -> fails: successor */
/* check closed-when-sent: -DCLOSED_WHEN_SENT -DPASSES=1 -> fails: lost */
/* check taken-before-stored: -DTAKEN_BEFORE_STORED -DPASSES=1 -> fails: lost */
/* check used-when-taken: -DUSED_WHEN_TAKEN -DPASSES=1 -> fails: used[0] */
/* check sent-is-taken-back: -DSENT_IS_TAKEN_BACK -DPASSES=1 -> fails: used[0] */

/* Processes that ask for the listeners, at any time. */
#ifndef TAKERS
#define TAKERS 2
#endif
/* Connections that the generation which is replaced passes on. */
#ifndef PASSES
#define PASSES 1
#endif
/* How often a process is killed, a handover is given up, and a task that passes a connection on is
cancelled, in one execution. */
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef ABORTS
#define ABORTS 1
#endif
#ifndef CANCELS
#define CANCELS 1
#endif

/* Process 0 is the generation that runs; the others ask for its listeners. */
#define PROCESSES (TAKERS + 1)
#define NONE 0
#define ALL ((1 << PASSES) - 1)
#define BIT(c) (1 << (c))
#define HAS(set, c) (((set) & BIT(c)) != 0)
#define ADD(set, c) set = (set) | BIT(c)
#define REMOVE(set, c) set = (set) & (255 - BIT(c))

/* Frames. */
mtype = { HELLO, TAKEN, PREPARED, FAILED, SERVING, BUSY, OFFER, LISTENERS, COMMIT, ABORT, RELEASED,
  PASSED, KEPT };
/* What the generation that runs does. */
mtype = { SERVES, OFFERS, WAITS, COMMITS, PROBATION, DRAINS };
mtype phase = SERVES;

chan to_new[PROCESSES] = [4] of { mtype, byte };
chan to_old[PROCESSES] = [4] of { mtype, byte };

bool alive[PROCESSES];
bool was_killed[PROCESSES];
/* Whether a process has ended by itself, as it should. */
bool has_quit[PROCESSES];
bool has[PROCESSES];
bool accepts[PROCESSES];
bool committed[PROCESSES];
/* Whether process 0 has closed its end of a channel. */
bool closed[PROCESSES];
/* To which process it hands over, or has handed over. */
byte successor = NONE;

/* Connections: for each process those that its program uses; those that were sent and not
acknowledged; those whose tasks were cancelled after that. */
byte used[PROCESSES];
byte sent;
byte cancelled;
/* For the assertions only: those that a successor has had. */
byte was_stored;

/* What can still go wrong. */
byte crashes = CRASHES;
byte aborts = ABORTS;
byte cancels = CANCELS;

hidden byte services;
hidden byte lost;

inline die(me) {
  alive[me] = false;
  has[me] = false;
  accepts[me] = false;
  used[me] = 0
}

inline be_killed(me) {
  printf("process %d is killed\n", me);
  crashes--;
  was_killed[me] = true;
  die(me)
}

/* Killed, or ended by itself, and all that it has sent was read. */
#define HAS_ENDED(t) (!alive[t] && empty(to_old[t]))

/* At every moment a process accepts. If the successor ends on probation, connections wait in the
queues of the listeners until process 0 sees that. */
#define SERVED (accepts[0] || (successor != NONE && (accepts[successor] || !alive[successor])))

inline check_service() {
  assert(!alive[0] || phase == DRAINS || has[0]);
  assert(!alive[0] || SERVED)
}

/* No connection has two owners. */
inline use_here(set) {
  used[0] = used[0] | (set);
  assert((used[0] & used[successor]) == 0)
}

/* ---------------------------------------------------------------- the generation that runs */

inline tell(t, frame, what) {
  if
  :: alive[t] && !closed[t] -> to_new[t] ! frame, what
  :: else -> skip /* the kernel says EPIPE */
  fi
}

inline forget_successor() {
  closed[successor] = true;
  successor = NONE;
#ifndef NO_RETURN
  accepts[0] = true;
#endif
  phase = SERVES
}

inline release() {
  printf("old: released\n");
  tell(successor, RELEASED, 0);
  accepts[0] = false;
  has[0] = false;
  phase = DRAINS
}

inline on_frame(t, frame, what) {
  if
#ifdef THIRD_IS_SERVED
  :: frame == HELLO && phase != DRAINS ->
#else
  :: frame == HELLO && phase != DRAINS && phase != SERVES -> tell(t, BUSY, 0); closed[t] = true
  :: frame == HELLO && phase == SERVES ->
#endif
    assert(successor == NONE);
    successor = t;
    phase = OFFERS;
    tell(t, OFFER, 0);
    tell(t, LISTENERS, 0)
  /* It tries again, and reaches the successor. */
  :: frame == HELLO && phase == DRAINS -> closed[t] = true
  :: frame == TAKEN -> assert(phase == OFFERS); phase = WAITS
  :: frame == PREPARED ->
    assert(phase == WAITS);
    committed[t] = true;
    tell(t, COMMIT, 0);
    phase = COMMITS;
#ifdef STOP_AT_COMMIT
    accepts[0] = false;
#endif
#ifdef LISTENERS_CLOSED_EARLY
    has[0] = false;
#endif
#ifdef RELEASE_AT_ONCE
    release()
#endif
  :: frame == SERVING ->
    assert(phase == COMMITS);
    accepts[0] = false;
    phase = PROBATION
  :: frame == FAILED -> forget_successor()
  :: frame == KEPT ->
    assert(HAS(sent, what));
    REMOVE(sent, what);
#ifdef USED_WHEN_TAKEN
    use_here(BIT(what))
#endif
  fi
}

#define RECEIVE(t) \
  atomic { alive[0] && nempty(to_old[t]) && !closed[t] -> \
    to_old[t] ? frame, what; \
    printf("old: %e from %d\n", frame, t); \
    on_frame(t, frame, what); \
    check_service() \
  }

proctype old() {
  mtype frame;
  byte what;
end:
  do
  :: RECEIVE(1)
#if TAKERS > 1
  :: RECEIVE(2)
#endif
  /* A timeout, or a cancellation. */
  :: atomic { alive[0] && aborts > 0 && successor != NONE && phase != DRAINS ->
      printf("old: gives the handover to %d up\n", successor);
      aborts--;
#ifndef ABORT_UNSAID
      tell(successor, ABORT, 0);
#endif
      forget_successor();
      check_service()
    }
  :: atomic { phase == PROBATION && alive[0] && alive[successor] -> release(); check_service() }
  :: atomic { alive[0] && successor != NONE && phase != DRAINS && HAS_ENDED(successor) ->
      printf("old: the successor has ended\n");
      forget_successor()
    }
  :: atomic { alive[0] && phase == DRAINS && used[0] != 0 && alive[successor] ->
      what = (HAS(used[0], 0) -> 0 : 1);
      printf("old: passes connection %d on\n", what);
      REMOVE(used[0], what);
      ADD(sent, what);
      tell(successor, PASSED, what)
    }
  :: atomic { alive[0] && cancels > 0 && (sent & (255 - cancelled)) != 0 ->
      cancels--;
      what = (HAS(sent & (255 - cancelled), 0) -> 0 : 1);
      printf("old: the task that passes connection %d on is cancelled\n", what);
#ifdef SENT_IS_TAKEN_BACK
      REMOVE(sent, what);
      use_here(BIT(what))
#else
      ADD(cancelled, what)
#endif
    }
  :: atomic { alive[0] && phase == DRAINS && sent != 0 && HAS_ENDED(successor) ->
      printf("old: {%d} are given back\n", sent);
#ifndef CLOSED_WHEN_SENT
      use_here(sent & (255 - cancelled));
#endif
      sent = 0
    }
  :: atomic { alive[0] && crashes > 0 -> be_killed(0) }
  od
}

/* ---------------------------------------------------------------- a process that asks */

inline tell_old(frame, what) {
  if
  :: alive[0] && !closed[me] -> to_old[me] ! frame, what
  :: else -> skip /* the kernel says EPIPE */
  fi
}

inline quit() {
  has_quit[me] = true;
  die(me)
}

#ifdef ABORT_UNREAD
#define OLD_HAS_ENDED (closed[me] || !alive[0])
#else
#define OLD_HAS_ENDED ((closed[me] || !alive[0]) && empty(to_new[me]))
#endif

inline accept_here() {
  accepts[me] = true;
  assert(committed[me] || OLD_HAS_ENDED)
}

/* A connection is in the memory of the successor. */
inline store() {
  ADD(was_stored, what);
  ADD(used[me], what);
  assert(!alive[0] || !HAS(used[0], what))
}

proctype new(byte me) {
  mtype frame;
  byte what;
  /* Whether it has said PREPARED, accepts, and is the service. */
  bool is_prepared, says_serving, is_orphan;
  byte stored = NONE;

  atomic {
    if
    :: alive[0] -> alive[me] = true; to_old[me] ! HELLO, 0
    :: true -> alive[me] = false; goto over
    fi
  };
end:
  do
  :: atomic { alive[me] && !is_orphan && nempty(to_new[me]) && stored == NONE ->
      to_new[me] ? frame, what;
      printf("new %d: %e\n", me, frame);
      if
      :: frame == BUSY || frame == ABORT -> quit()
      :: frame == OFFER -> skip
      :: frame == LISTENERS -> has[me] = true; tell_old(TAKEN, 0)
      :: frame == COMMIT -> accept_here(); says_serving = true
      :: frame == RELEASED -> assert(has[me] && accepts[me])
      :: frame == PASSED ->
        stored = what + 1;
#ifdef TAKEN_BEFORE_STORED
        tell_old(KEPT, what)
#else
        store()
#endif
      fi
    }
  :: atomic { alive[me] && stored != NONE ->
#ifdef TAKEN_BEFORE_STORED
      what = stored - 1;
      store();
#else
      tell_old(KEPT, stored - 1);
#endif
      stored = NONE
    }
  :: atomic { alive[me] && has[me] && !is_prepared ->
      printf("new %d: is prepared\n", me);
      is_prepared = true;
      tell_old(PREPARED, 0);
#ifdef SERVE_EARLY
      accept_here();
#endif
      if
      :: is_orphan -> accept_here()
      :: else -> skip
      fi
    }
  :: atomic { alive[me] && says_serving -> says_serving = false; tell_old(SERVING, 0) }
  /* It fails before it is the service. */
  :: atomic { alive[me] && !accepts[me] && crashes > 0 ->
      printf("new %d: fails\n", me);
      crashes--;
      tell_old(FAILED, 0);
      quit()
    }
  :: atomic { alive[me] && OLD_HAS_ENDED && !has[me] ->
      /* Nothing was offered: it tries again, and is not part of this any more. */
      quit()
    }
  :: atomic { alive[me] && OLD_HAS_ENDED && has[me] && !is_orphan ->
      printf("new %d: goes on alone\n", me);
      is_orphan = true;
#ifdef ORPHAN_EXITS
      die(me);
#endif
      if
      :: is_prepared && alive[me] -> accept_here()
      :: else -> skip
      fi
    }
  :: atomic { alive[me] && crashes > 0 -> be_killed(me) }
  od;
over:
  skip
}

/* When nothing happens any more. */
inline check_end() {
  services = accepts[0] + accepts[1];
#if TAKERS > 1
  services = services + accepts[2];
#endif
  /* Exactly one serves, unless all that have the listeners were killed or have failed. */
  assert(services <= 1);
  assert(services == 1 || ((!alive[0] || phase == DRAINS) &&
    (successor == NONE || was_killed[successor] || has_quit[successor])));
  /* No connection was lost that this process could have given back. */
  lost = ALL & (255 - (used[0] | was_stored | cancelled));
  assert(!alive[0] || lost == 0);
  assert(!alive[0] || sent == 0)
}

init {
  atomic {
    alive[0] = true;
    has[0] = true;
    accepts[0] = true;
    used[0] = ALL;
    run old();
    run new(1)
#if TAKERS > 1
    ;
    run new(2)
#endif
  };
  /* Nothing goes wrong any more. */
  atomic { crashes = 0; aborts = 0; cancels = 0 };
  atomic { timeout -> check_end() }
}
