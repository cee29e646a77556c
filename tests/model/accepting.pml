/* Workers that accept connections from listening sockets which they share (accept="workers").

docs/explanation/pool-model.md describes this model; tests/model/check.py checks it.

A step of a process is one atomic block. A worker can be killed between any two of its steps.

Each comment that begins with "check" is one run of spin: its name, its options, and its result. */

/* check accepting: -DCONNECTIONS=3 -> holds */
/* check accepting-crashes: -DCONNECTIONS=2 -DCRASHES=2 -> holds */
/* check accepting-no-endless-loop: -DCONNECTIONS=2 -> holds, no cycle */

/* Faults that spin must find. */
/* check note-late: -DNOTE_LATE -DCONNECTIONS=2 -> fails: is_noted */
/* check read-early: -DREAD_EARLY -DCONNECTIONS=2 -> fails: ended */
/* check close-early: -DCLOSE_BEFORE_STOPPED -DCONNECTIONS=2 -> fails: backlog */
/* check stop-forgotten: -DSTOP_FORGOTTEN -DCONNECTIONS=2 -> fails: invalid end state */
/* check dead-worker-awaited: -DDEAD_WORKER_AWAITED -DCONNECTIONS=2 -> fails: invalid end state */

#ifndef CONNECTIONS
#define CONNECTIONS 2
#endif
/* How many connections a worker handles at a time, and how often one is killed and replaced. */
#ifndef LIMIT
#define LIMIT 1
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef CHANGES
#define CHANGES 1
#endif

#define WORKERS 2
#define ALL ((1 << CONNECTIONS) - 1)
#define BIT(c) (1 << (c))
#define HAS(set, c) (((set) & BIT(c)) != 0)
#define ADD(set, c) set = (set) | BIT(c)
#define REMOVE(set, c) set = (set) & (255 - BIT(c))
#define COUNT(set) (((set) & 1) + (((set) >> 1) & 1) + (((set) >> 2) & 1))

mtype = { ACCEPT, STOP, DRAIN, STOPPED };

/* The queue of the listening socket, and whether each process holds that socket. */
byte backlog;
bool pool_holds = true;
bool worker_holds[WORKERS];

/* What the pool knows of its workers: whether there is one, and whether it may hold the socket. */
bool exists[WORKERS];
bool accepts[WORKERS];
bool stopping;
bool over;

chan to_worker[WORKERS] = [3] of { mtype };
chan to_pool[WORKERS] = [3] of { mtype };

/* The workers: connections that were accepted and not noted, and the slots of the log. */
bool alive[WORKERS];
bool drained[WORKERS];
bool gone[WORKERS];
byte accepted[WORKERS];
byte slots[WORKERS];
#ifdef NOTE_LATE
byte unnoted[WORKERS];
#endif

byte crashes = CRASHES;
byte changes = CHANGES;

/* For the assertions: connections whose handlers have begun, and those that have an end. */
byte begun;
byte ended;

hidden byte i;
hidden byte c;
hidden mtype kind;

#define IS_CLOSED (!pool_holds && !worker_holds[0] && !worker_holds[1])

inline end_connection(what) {
  assert(!HAS(ended, what));
  ADD(ended, what)
}

/* The last close resets what is in the queue. */
inline close_check() {
  assert(!IS_CLOSED || backlog == 0)
}

/* Any of the connections in a set. */
inline choose(set) {
  if
  :: HAS(set, 0) -> c = 0
  :: HAS(set, 1) -> c = 1
#if CONNECTIONS > 2
  :: HAS(set, 2) -> c = 2
#endif
  fi
}

proctype client(byte me) {
  atomic {
    if
    :: IS_CLOSED -> end_connection(me) /* the kernel refuses it */
    :: else -> ADD(backlog, me)
    fi
  }
}

proctype worker(byte w) {
end:
  do
  :: atomic { alive[w] && len(to_worker[w]) > 0 ->
      to_worker[w] ? kind;
      if
      :: kind == ACCEPT -> worker_holds[w] = true
      :: else ->
        worker_holds[w] = false;
        close_check();
        to_pool[w] ! STOPPED;
        drained[w] = (drained[w] || kind == DRAIN)
      fi
    }
  :: atomic { worker_holds[w] && backlog != 0 && COUNT(accepted[w] | slots[w]) < LIMIT ->
      choose(backlog);
      REMOVE(backlog, c);
      ADD(accepted[w], c);
      printf("worker %d: accepts %d\n", w, c)
    }
  /* The handler's task runs after the connection was noted. */
  :: atomic { accepted[w] != 0 ->
      choose(accepted[w]);
      REMOVE(accepted[w], c);
      assert(!HAS(begun, c));
      ADD(begun, c);
#ifdef NOTE_LATE
      ADD(unnoted[w], c)
#else
      ADD(slots[w], c)
#endif
    }
#ifdef NOTE_LATE
  :: atomic { unnoted[w] != 0 -> slots[w] = slots[w] | unnoted[w]; unnoted[w] = 0 }
#endif
  :: atomic { alive[w] && slots[w] != 0 ->
      choose(slots[w]);
      REMOVE(slots[w], c);
      printf("worker %d: has handled %d\n", w, c);
      end_connection(c)
    }
  :: atomic { alive[w] && drained[w] && accepted[w] == 0 && slots[w] == 0 ->
      alive[w] = false;
      drained[w] = false;
      gone[w] = true
    }
  :: atomic { alive[w] && crashes > 0 ->
      printf("worker %d: killed\n", w);
      crashes--;
#ifdef NOTE_LATE
      bool is_noted = (unnoted[w] == 0);
      assert(is_noted);
#endif
      if
      :: accepted[w] != 0 ->
        /* Its handler has not begun; the client sees a reset. */
        choose(accepted[w]);
        end_connection(c);
        accepted[w] = 0
      :: else -> skip
      fi;
      worker_holds[w] = false;
      close_check();
      do
      :: len(to_worker[w]) > 0 -> to_worker[w] ? kind
      :: else -> break
      od;
      alive[w] = false;
      drained[w] = false;
      gone[w] = true
    }
  od
}

inline settle(w) {
  i = 0;
  do
  :: i < CONNECTIONS ->
    if
    :: HAS(slots[w], i) ->
      printf("pool: %d was abandoned\n", i);
      assert(HAS(begun, i));
      end_connection(i)
    :: else -> skip
    fi;
    i++
  :: else -> break
  od
}

inline send(w, what) {
  if
  :: alive[w] -> to_worker[w] ! what
  :: else -> skip
  fi
}

/* What the pool does for one worker. */
proctype handle(byte w) {
  do
  :: atomic { !exists[w] && !over ->
      exists[w] = true;
      alive[w] = true;
      if
      :: !stopping ->
        accepts[w] = true;
        to_worker[w] ! ACCEPT
      :: else -> skip
      fi
    }
  :: atomic { len(to_pool[w]) > 0 -> to_pool[w] ? kind; accepts[w] = false }
#ifdef READ_EARLY
  :: atomic { exists[w] && alive[w] && crashes < CRASHES && slots[w] != 0 -> settle(w) }
#endif
  :: atomic { gone[w] && len(to_pool[w]) == 0 ->
      gone[w] = false;
      settle(w);
      slots[w] = 0;
#ifndef DEAD_WORKER_AWAITED
      accepts[w] = false;
#endif
      exists[w] = false
    }
  /* Another one is to take its place. */
  :: atomic { exists[w] && alive[w] && changes > 0 && !stopping ->
      changes--;
      to_worker[w] ! DRAIN
    }
  :: atomic { over && !exists[w] -> break }
  od
}

/* A drain of the server, at any moment. */
proctype server() {
  atomic { !stopping ->
    printf("server: drains\n");
    stopping = true;
#ifndef STOP_FORGOTTEN
    i = 0;
    do
    :: i < WORKERS ->
      if
      :: accepts[i] -> send(i, STOP)
      :: else -> skip
      fi;
      i++
    :: else -> break
    od
#endif
  };
  do
  /* It accepts beside the workers, and its pool handles the connections. */
  :: atomic { backlog != 0 -> choose(backlog); REMOVE(backlog, c); end_connection(c) }
#ifdef CLOSE_BEFORE_STOPPED
  :: atomic { backlog == 0 ->
#else
  :: atomic { backlog == 0 && !accepts[0] && !accepts[1] ->
#endif
      pool_holds = false;
      close_check();
      over = true;
      send(0, DRAIN);
      send(1, DRAIN);
      break
    }
  od;
  atomic { ended == ALL && !exists[0] && !exists[1] ->
    assert(IS_CLOSED && backlog == 0 && slots[0] == 0 && slots[1] == 0)
  }
}

init {
  atomic {
    run server();
    run handle(0);
    run handle(1);
    run worker(0);
    run worker(1);
    run client(0);
    run client(1)
#if CONNECTIONS > 2
    ;
    run client(2)
#endif
  }
}
