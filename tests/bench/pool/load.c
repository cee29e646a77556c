/* The load: connections to 127.0.0.1, each with one request, answered by the pid of the server.
 *
 * Invariant: it costs as little as it can, beside what it measures, and one connection
 * never waits for another. In a closed loop (--at-once N) a connection that ends is followed by the next: what is
 * measured is the rate. In an open loop (--rate R) connections begin at their times, however
 * many others are still open, and latency counts from these times: a server that stands still is
 * charged for all connections that wait, even for those that could not be started.
 *
 * A request is 64 bytes, of which the first says what to do: 'b' to burn CPU before answering,
 * '-' not to. Of each --burn-one-in connections that follow each other one burns, at a place that
 * the seed decides; so do the times of a Poisson process. The same seed gives the same load.
 *
 * Every socket is closed with SO_LINGER 0, when its end has come: that ends the other side's
 * waiting (FIN_WAIT2), so that no port stays occupied (TIME_WAIT).
 *
 * One line of JSON is printed when --idle connections stand, if there are any, and one with what
 * was measured. Between them a line on standard input is waited for, and at its end all ends.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define REQUEST 64
#define ANSWER 32
#define MOST_PIDS 1024
#define EVENTS 256
/* Seconds for connections that neither end nor fail. */
#define PATIENCE 10.0

/* What an event's data is when it is not the number of a connection. */
#define TIMER UINT32_MAX

struct connection {
    int fd;
    double due;
    char burns, sent, length;
    char answer[ANSWER];
};

struct sample {
    double latency;
    char burns;
};

static struct {
    int port, at_once, burn_one_in, idle;
    double rate, seconds;
    int poisson;
    uint64_t seed;
} options = {.at_once = 1, .seconds = 1, .seed = 1};

static int poller;
static struct sockaddr_in server;
static struct connection *connections;
static uint32_t *unused;
static uint32_t room, open_now, most_open;
static struct sample *samples;
static double *lateness;
static size_t begun, answered, in_time, samples_room;
static double first, last;
static struct {
    long pid;
    size_t count;
} pids[MOST_PIDS];
static int pid_count;
static struct {
    size_t refused, reset, timed_out, no_answer, unfinished, no_room, other;
} errors;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void wrong(const char *what)
{
    fprintf(stderr, "load: %s\n", what);
    exit(2);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void *room_for(size_t count, size_t size)
{
    void *found = calloc(count, size);
    if (!found)
        die("calloc");
    return found;
}

/* SplitMix64: short, and the same everywhere. */
static uint64_t chance(void)
{
    uint64_t mixed = options.seed += 0x9e3779b97f4a7c15;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
    return mixed ^ (mixed >> 31);
}

/* Whether the next connection burns: one in each block, so that no run has more of them. */
static int burns_next(void)
{
    static int place, chosen;
    if (!options.burn_one_in)
        return 0;
    if (place == 0)
        chosen = (int)(chance() % options.burn_one_in);
    int burns = place == chosen;
    place = (place + 1) % options.burn_one_in;
    return burns;
}

static double until_next(void)
{
    if (!options.poisson)
        return 1 / options.rate;
    double uniform = ((double)(chance() >> 11) + 1) * 0x1p-53;
    return -log(uniform) / options.rate;
}

/****************************************************************
 * One connection
 ****************************************************************/

static int connected(int flags)
{
    int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (sock < 0)
        return -1;
    struct linger none = {.l_onoff = 1, .l_linger = 0};
    setsockopt(sock, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    if (connect(sock, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS) {
        int why = errno;
        close(sock);
        errno = why;
        return -1;
    }
    return sock;
}

static void count_error(int why)
{
    switch (why) {
    case ECONNREFUSED:
        errors.refused++;
        break;
    case ECONNRESET:
    case EPIPE:
        errors.reset++;
        break;
    case ETIMEDOUT:
        errors.timed_out++;
        break;
    case EMFILE:
    case ENFILE:
    case EADDRNOTAVAIL:
        errors.no_room++;
        break;
    default:
        fprintf(stderr, "load: %s\n", strerror(why));
        errors.other++;
    }
}

static void count_answer(struct connection *each, double time)
{
    char *end;
    each->answer[(int)each->length] = 0;
    long pid = strtol(each->answer, &end, 10);
    if (end == each->answer || *end != '\n') {
        errors.no_answer++;
        return;
    }
    int i = 0;
    while (i < pid_count && pids[i].pid != pid)
        i++;
    if (i == MOST_PIDS)
        wrong("too many pids");
    if (i == pid_count)
        pids[pid_count++].pid = pid;
    pids[i].count++;
    if (answered == samples_room) {
        samples_room = samples_room ? 2 * samples_room : 65536;
        samples = realloc(samples, samples_room * sizeof *samples);
        if (!samples)
            die("realloc");
    }
    samples[answered++] = (struct sample){time - each->due, each->burns};
    if (time <= last)
        in_time++;
}

static void end(struct connection *each)
{
    close(each->fd);
    each->fd = -1;
    unused[--open_now] = (uint32_t)(each - connections);
}

/* Send the request, at once or when the connection stands; return whether it still lives. */
static int ask(struct connection *each)
{
    static char request[REQUEST];
    memset(request, '.', sizeof request);
    request[0] = each->burns ? 'b' : '-';
    request[REQUEST - 1] = '\n';
    if (send(each->fd, request, sizeof request, MSG_NOSIGNAL) == REQUEST) {
        each->sent = 1;
        return 1;
    }
    if (errno == EAGAIN)
        return 1;
    count_error(errno);
    end(each);
    return 0;
}

static void begin(double due)
{
    if (begun % 65536 == 0) {
        lateness = realloc(lateness, (begun + 65536) * sizeof *lateness);
        if (!lateness)
            die("realloc");
    }
    lateness[begun++] = now() - due;
    int burns = burns_next();
    if (open_now == room) {
        errors.no_room++;
        return;
    }
    int sock = connected(SOCK_NONBLOCK);
    if (sock < 0) {
        count_error(errno);
        return;
    }
    uint32_t place = unused[open_now++];
    struct connection *each = &connections[place];
    *each = (struct connection){.fd = sock, .due = due, .burns = (char)burns};
    if (open_now > most_open)
        most_open = open_now;
    if (!ask(each))
        return;
    struct epoll_event event = {.events = EPOLLIN | (each->sent ? 0 : EPOLLOUT)};
    event.data.u32 = place;
    if (epoll_ctl(poller, EPOLL_CTL_ADD, sock, &event) < 0)
        die("epoll_ctl");
}

static void go_on(struct connection *each, uint32_t events)
{
    if (!each->sent && events & EPOLLOUT) {
        if (!ask(each))
            return;
        if (each->sent) {
            struct epoll_event event = {.events = EPOLLIN};
            event.data.u32 = (uint32_t)(each - connections);
            if (epoll_ctl(poller, EPOLL_CTL_MOD, each->fd, &event) < 0)
                die("epoll_ctl");
        }
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return;
    ssize_t got;
    do {
        /* The last byte stays for the NUL; an answer that leaves no room is none. */
        got = recv(each->fd, each->answer + each->length, (size_t)(ANSWER - 1 - each->length), 0);
        if (got > 0)
            each->length = (char)(each->length + got);
    } while (got > 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got < 0)
        count_error(errno);
    else
        count_answer(each, now());
    end(each);
}

/****************************************************************
 * The loops
 ****************************************************************/

static void round_of_events(int timeout)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(poller, events, EVENTS, timeout);
    if (count < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < count; i++)
        if (events[i].data.u32 != TIMER)
            go_on(&connections[events[i].data.u32], events[i].events);
}

static void finish(void)
{
    double patience = now() + PATIENCE;
    while (open_now && now() < patience)
        round_of_events(100);
    errors.unfinished = open_now;
}

static void closed_loop(void)
{
    while (now() < last) {
        /* Also instead of those that failed, so that failing does not end the load. */
        for (int due = options.at_once - (int)open_now; due > 0; due--)
            begin(now());
        round_of_events(10);
    }
    finish();
}

static void open_loop(void)
{
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    event.data.u32 = TIMER;
    if (timer < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event) < 0)
        die("timerfd");
    double due = first + until_next();
    while (due < last) {
        while (due < last && due <= now()) {
            begin(due);
            due += until_next();
        }
        /* Set again, its time is absolute: one that has passed rings at once. */
        struct itimerspec at = {0};
        at.it_value.tv_sec = (time_t)due;
        at.it_value.tv_nsec = (long)((due - floor(due)) * 1e9);
        if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL) < 0)
            die("timerfd_settime");
        round_of_events(-1);
    }
    close(timer);
    finish();
}

/* Open connections that say nothing, and have them stand before anything else happens. */
static void hold_idle(void)
{
    for (int i = 0; i < options.idle; i++) {
        int sock = connected(0);
        if (sock < 0)
            die("an idle connection");
        /* Slower than servers accept: when their queue is full, a second passes until the next. */
        if (i % 64 == 63)
            usleep(20000);
    }
    printf("{\"idle\": %d}\n", options.idle);
    fflush(stdout);
    if (getchar() == EOF)
        exit(0);
}

/****************************************************************
 * What is printed
 ****************************************************************/

static int compare(const void *one, const void *two)
{
    double left = *(const double *)one, right = *(const double *)two;
    return (left > right) - (left < right);
}

static void print_percentiles(const char *name, double *values, size_t count)
{
    static const struct {
        const char *name;
        double share;
    } shares[] = {{"p50", .5}, {"p90", .9}, {"p99", .99}, {"p999", .999}, {"most", 1}};

    qsort(values, count, sizeof *values, compare);
    printf("\"%s\": {\"count\": %zu", name, count);
    for (size_t i = 0; count && i < sizeof shares / sizeof *shares; i++) {
        /* The nearest rank: a value that was measured. */
        size_t rank = (size_t)ceil(shares[i].share * (double)count);
        printf(", \"%s\": %.9f", shares[i].name, values[rank ? rank - 1 : 0]);
    }
    printf("}");
}

static void print_latencies(void)
{
    double *values = room_for(answered + 1, sizeof *values);
    for (int kind = 0; kind < 3; kind++) {
        size_t count = 0;
        for (size_t i = 0; i < answered; i++)
            if (kind == 0 || samples[i].burns == (kind == 2))
                values[count++] = samples[i].latency;
        print_percentiles((const char *[]){"latency", "light", "burning"}[kind], values, count);
        printf(", ");
    }
    print_percentiles("lateness", lateness, begun);
    free(values);
}

static double own_cpu(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
           (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

static void print_result(double cpu, double took)
{
    printf("{\"seconds\": %g, \"took\": %.6f, \"begun\": %zu, \"answered\": %zu, "
           "\"in_time\": %zu, \"most_open\": %u, \"own_cpu\": %.6f, ",
           options.seconds, took, begun, answered, in_time, most_open, cpu);
    print_latencies();
    printf(", \"errors\": {\"refused\": %zu, \"reset\": %zu, \"timed out\": %zu, "
           "\"no answer\": %zu, \"unfinished\": %zu, \"no room\": %zu, \"other\": %zu}",
           errors.refused, errors.reset, errors.timed_out, errors.no_answer, errors.unfinished,
           errors.no_room, errors.other);
    printf(", \"pids\": {");
    for (int i = 0; i < pid_count; i++)
        printf("%s\"%ld\": %zu", i ? ", " : "", pids[i].pid, pids[i].count);
    printf("}}\n");
    fflush(stdout);
}

static void read_options(int count, char **words)
{
    static const struct option known[] = {
        {"port", required_argument, 0, 'p'},        {"at-once", required_argument, 0, 'c'},
        {"rate", required_argument, 0, 'r'},        {"poisson", no_argument, 0, 'x'},
        {"seconds", required_argument, 0, 's'},     {"seed", required_argument, 0, 'e'},
        {"burn-one-in", required_argument, 0, 'b'}, {"idle", required_argument, 0, 'i'},
        {0, 0, 0, 0},
    };
    int key;
    while ((key = getopt_long(count, words, "", known, 0)) != -1)
        switch (key) {
        case 'p':
            options.port = atoi(optarg);
            break;
        case 'c':
            options.at_once = atoi(optarg);
            break;
        case 'r':
            options.rate = atof(optarg);
            break;
        case 'x':
            options.poisson = 1;
            break;
        case 's':
            options.seconds = atof(optarg);
            break;
        case 'e':
            options.seed = strtoull(optarg, 0, 10);
            break;
        case 'b':
            options.burn_one_in = atoi(optarg);
            break;
        case 'i':
            options.idle = atoi(optarg);
            break;
        default:
            wrong("--port N [--at-once N | --rate R [--poisson]] [--seconds S] [--seed N] "
                  "[--burn-one-in N] [--idle N]");
        }
    if (options.port < 1 || options.at_once < 1 || options.rate < 0 || options.burn_one_in < 0)
        wrong("--port and --at-once are at least 1, --rate and --burn-one-in at least 0");
}

int main(int count, char **words)
{
    read_options(count, words);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    /* What the standard streams and the pollers take is far less than that. */
    rlim_t most = limit.rlim_cur > 65536 ? 65536 : limit.rlim_cur;
    if (most < (rlim_t)options.idle + 128)
        wrong("RLIMIT_NOFILE is too low for so many idle connections: raise it (ulimit -n)");
    room = (uint32_t)most - (uint32_t)options.idle - 64;
    connections = room_for(room, sizeof *connections);
    unused = room_for(room, sizeof *unused);
    for (uint32_t i = 0; i < room; i++)
        unused[i] = i;
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)options.port);
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0)
        die("epoll_create1");
    signal(SIGPIPE, SIG_IGN);
    if (options.idle)
        hold_idle();
    double cpu = own_cpu();
    first = now();
    last = first + options.seconds;
    if (options.rate > 0)
        open_loop();
    else
        closed_loop();
    print_result(own_cpu() - cpu, now() - first);
    return 0;
}
