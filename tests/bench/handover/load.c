/*
 * HTTP clients, while their server is replaced.
 *
 *     load --port N | --path PATH  --seconds S
 *          --at-once N               closed loop: so many connections at a time
 *          --rate R                  open loop: so many requests a second, a connection each
 *          --rate R --kept N         open loop, on so many connections that are kept
 *
 * Each request has one outcome: answered; refused; reset; empty (the end of the stream before a
 * byte); wrong (another status, or a part of an answer); unfinished. One that is answered more than
 * a second after its time is late. Latency is measured from the time at which a request was to
 * begin, however late it did. The gap is the longest time without an answer.
 *
 * With --kept, the first line that is printed says that all connections stand. The last line is the
 * result, as JSON.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 256
#define ANSWER 1024
/* Seconds for requests that neither end nor fail, and how late an answer may be. */
#define PATIENCE 10.0
#define LATE 1.0
#define TIMER UINT32_MAX

enum outcome { ANSWERED, REFUSED, RESET, EMPTY, WRONG, UNFINISHED, NO_ROOM, OUTCOMES };
static const char *const names[] = {"answered", "refused",    "reset",  "empty",
                                    "wrong",    "unfinished", "no room"};

struct connection {
    int fd;
    double begin;
    /* Of the request; and of the answer. */
    char is_busy, is_sent;
    uint32_t length;
    char answer[ANSWER];
};

static struct {
    int port, at_once, kept;
    const char *path;
    double rate, seconds;
} options = {.seconds = 1};

static const char closing[] = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
static const char keeping[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";

static int poller;
static struct connection *connections;
static uint32_t *unused, room, open_now, most_open;
static double *latencies, first, last, last_answer, gap;
static size_t begun, answered, latencies_room, outcomes[OUTCOMES], late, closed;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static int connect_to_server(void)
{
    int family = options.path ? AF_UNIX : AF_INET;
    int sock = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (sock < 0)
        return -1;
    int result;
    if (options.path) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        strncpy(address.sun_path, options.path, sizeof address.sun_path - 1);
        result = connect(sock, (struct sockaddr *)&address, sizeof address);
    } else {
        struct linger none = {.l_onoff = 1, .l_linger = 0};
        setsockopt(sock, SOL_SOCKET, SO_LINGER, &none, sizeof none);
        struct sockaddr_in address = {.sin_family = AF_INET};
        address.sin_port = htons((uint16_t)options.port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        result = connect(sock, (struct sockaddr *)&address, sizeof address);
    }
    if (result < 0 && errno != EINPROGRESS) {
        int why = errno;
        close(sock);
        errno = why;
        return -1;
    }
    return sock;
}

static enum outcome outcome_of(int why)
{
    switch (why) {
    case ECONNREFUSED:
    case ENOENT:
    case EAGAIN: /* the queue of a Unix listener is full */
        return REFUSED;
    case ECONNRESET:
    case EPIPE:
        return RESET;
    case EMFILE:
    case ENFILE:
    case EADDRNOTAVAIL:
        return NO_ROOM;
    default:
        fprintf(stderr, "load: %s\n", strerror(why));
        return WRONG;
    }
}

static void count(struct connection *each, enum outcome outcome)
{
    double time = now();
    outcomes[outcome]++;
    each->is_busy = 0;
    if (outcome != ANSWERED)
        return;
    if (answered == latencies_room) {
        latencies_room = latencies_room ? 2 * latencies_room : 65536;
        latencies = realloc(latencies, latencies_room * sizeof *latencies);
        if (!latencies)
            die("realloc");
    }
    latencies[answered++] = time - each->begin;
    late += time - each->begin > LATE;
    if (time <= last && time - last_answer > gap)
        gap = time - last_answer;
    last_answer = time;
}

static void end(struct connection *each)
{
    close(each->fd);
    each->fd = -1;
    unused[--open_now] = (uint32_t)(each - connections);
}

static void watch(struct connection *each, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events};
    event.data.u32 = (uint32_t)(each - connections);
    if (epoll_ctl(poller, operation, each->fd, &event) < 0)
        die("epoll_ctl");
}

/* Open a connection; return NULL and the outcome if that is not possible. */
static struct connection *opened(enum outcome *outcome)
{
    if (open_now == room) {
        *outcome = NO_ROOM;
        return NULL;
    }
    int sock = connect_to_server();
    if (sock < 0) {
        *outcome = outcome_of(errno);
        return NULL;
    }
    struct connection *each = &connections[unused[open_now++]];
    *each = (struct connection){.fd = sock};
    if (open_now > most_open)
        most_open = open_now;
    watch(each, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
    return each;
}

/* Send the request, now or as soon as the connection stands; return whether it still lives. */
static int ask(struct connection *each)
{
    const char *request = options.kept ? keeping : closing;
    size_t size = strlen(request);
    ssize_t sent = send(each->fd, request, size, MSG_NOSIGNAL);
    if (sent == (ssize_t)size) {
        each->is_sent = 1;
        watch(each, EPOLL_CTL_MOD, EPOLLIN);
        return 1;
    }
    if (sent < 0 && errno == EAGAIN)
        return 1;
    count(each, sent < 0 ? outcome_of(errno) : WRONG);
    end(each);
    return 0;
}

static void begin(double when)
{
    begun++;
    enum outcome outcome;
    struct connection *each = opened(&outcome);
    if (!each) {
        outcomes[outcome]++;
        return;
    }
    each->begin = when;
    each->is_busy = 1;
    ask(each);
}

/* The next request on a kept connection that is idle. */
static void begin_on_kept(double when)
{
    static uint32_t next;
    begun++;
    for (uint32_t i = 0; i < (uint32_t)options.kept; i++) {
        struct connection *each = &connections[next++ % (uint32_t)options.kept];
        if (each->fd < 0 || each->is_busy)
            continue;
        each->begin = when;
        each->is_busy = 1;
        each->is_sent = 0;
        each->length = 0;
        if (!ask(each))
            closed++;
        return;
    }
    outcomes[NO_ROOM]++;
}

/* Whether the whole answer has arrived, on a connection that is kept. */
static int is_whole(struct connection *each)
{
    each->answer[each->length] = 0;
    char *body = strstr(each->answer, "\r\n\r\n");
    char *size = strcasestr(each->answer, "content-length:");
    if (!body || !size || size > body)
        return 0;
    size_t head = (size_t)(body + 4 - each->answer);
    return each->length >= head + strtoul(size + 15, 0, 10);
}

static int is_good(struct connection *each)
{
    each->answer[each->length] = 0;
    return !strncmp(each->answer, "HTTP/1.1 200", 12) || !strncmp(each->answer, "HTTP/1.0 200", 12);
}

static void go_on(struct connection *each, uint32_t events)
{
    if (each->fd < 0)
        return;
    if (!each->is_sent && events & EPOLLOUT) {
        if (!each->is_busy)
            watch(each, EPOLL_CTL_MOD, EPOLLIN);
        else if (!ask(each))
            return;
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return;
    ssize_t got;
    do {
        if (each->length >= ANSWER - 1)
            each->length = 0;
        got = recv(each->fd, each->answer + each->length, ANSWER - 1 - each->length, 0);
        if (got > 0)
            each->length += (uint32_t)got;
        if (got > 0 && options.kept && each->is_busy && is_whole(each)) {
            count(each, is_good(each) ? ANSWERED : WRONG);
            return;
        }
    } while (got > 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (options.kept) {
        closed++;
        if (each->is_busy)
            count(each, got < 0 ? outcome_of(errno) : each->length ? WRONG : EMPTY);
    } else if (got < 0)
        count(each, outcome_of(errno));
    else
        count(each, !each->length ? EMPTY : is_good(each) ? ANSWERED : WRONG);
    end(each);
}

static void round_of_events(int timeout)
{
    struct epoll_event events[EVENTS];
    int number = epoll_wait(poller, events, EVENTS, timeout);
    if (number < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < number; i++)
        if (events[i].data.u32 != TIMER)
            go_on(&connections[events[i].data.u32], events[i].events);
}

static int busy(void)
{
    int found = 0;
    for (uint32_t i = 0; i < room; i++)
        found += connections[i].fd >= 0 && connections[i].is_busy;
    return found;
}

static void finish(void)
{
    double patience = now() + PATIENCE;
    while (busy() && now() < patience)
        round_of_events(20);
    outcomes[UNFINISHED] += (size_t)busy();
}

static void closed_loop(void)
{
    while (now() < last) {
        for (int missing = options.at_once - (int)open_now; missing > 0; missing--)
            begin(now());
        round_of_events(10);
    }
}

static void open_loop(void)
{
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    event.data.u32 = TIMER;
    if (timer < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event) < 0)
        die("timerfd");
    double next = first;
    while (next < last) {
        for (; next < last && next <= now(); next += 1 / options.rate)
            (options.kept ? begin_on_kept : begin)(next);
        /* Absolute: a time that has passed rings at once. */
        struct itimerspec at = {0};
        at.it_value.tv_sec = (time_t)next;
        at.it_value.tv_nsec = (long)((next - floor(next)) * 1e9);
        if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL) < 0)
            die("timerfd_settime");
        round_of_events(-1);
    }
    close(timer);
}

static void open_kept(void)
{
    enum outcome outcome;
    for (int i = 0; i < options.kept; i++) {
        while (!opened(&outcome))
            usleep(1000);
        /* Slower than servers accept. */
        if (i % 64 == 63)
            usleep(5000);
        round_of_events(0);
    }
    printf("{\"kept\": %d}\n", options.kept);
    fflush(stdout);
}

static int compare(const void *one, const void *two)
{
    double left = *(const double *)one, right = *(const double *)two;
    return (left > right) - (left < right);
}

static void print_result(void)
{
    static const struct {
        const char *name;
        double share;
    } shares[] = {{"p50", .5}, {"p99", .99}, {"p999", .999}, {"most", 1}};
    printf("{\"begun\": %zu, \"late\": %zu, \"closed\": %zu, \"gap\": %.6f, \"rate\": %.1f", begun,
           late, closed, gap, (double)answered / options.seconds);
    for (int i = 0; i < OUTCOMES; i++)
        printf(", \"%s\": %zu", names[i], outcomes[i]);
    qsort(latencies, answered, sizeof *latencies, compare);
    for (size_t i = 0; answered && i < sizeof shares / sizeof *shares; i++) {
        size_t rank = (size_t)ceil(shares[i].share * (double)answered);
        printf(", \"%s\": %.6f", shares[i].name, latencies[rank ? rank - 1 : 0]);
    }
    printf("}\n");
    fflush(stdout);
}

static void read_options(int number, char **words)
{
    static const struct option known[] = {
        {"port", required_argument, 0, 'p'},    {"path", required_argument, 0, 'u'},
        {"at-once", required_argument, 0, 'c'}, {"rate", required_argument, 0, 'r'},
        {"kept", required_argument, 0, 'k'},    {"seconds", required_argument, 0, 's'},
        {0, 0, 0, 0},
    };
    int key;
    while ((key = getopt_long(number, words, "", known, 0)) != -1)
        switch (key) {
        case 'p':
            options.port = atoi(optarg);
            break;
        case 'u':
            options.path = optarg;
            break;
        case 'c':
            options.at_once = atoi(optarg);
            break;
        case 'r':
            options.rate = atof(optarg);
            break;
        case 'k':
            options.kept = atoi(optarg);
            break;
        case 's':
            options.seconds = atof(optarg);
            break;
        default:
            exit(2);
        }
    if ((!options.port && !options.path) || (options.rate <= 0 && options.at_once < 1)) {
        fprintf(stderr, "load: --port or --path, and --rate or --at-once\n");
        exit(2);
    }
}

int main(int number, char **words)
{
    read_options(number, words);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    room = (uint32_t)(limit.rlim_cur > 65536 ? 65536 : limit.rlim_cur) - 64;
    if (room < (uint32_t)options.kept + 64) {
        fprintf(stderr, "load: RLIMIT_NOFILE is too low: raise it (ulimit -n)\n");
        exit(2);
    }
    connections = calloc(room, sizeof *connections);
    unused = calloc(room, sizeof *unused);
    if (!connections || !unused)
        die("calloc");
    for (uint32_t i = 0; i < room; i++) {
        unused[i] = i;
        connections[i].fd = -1;
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0)
        die("epoll_create1");
    signal(SIGPIPE, SIG_IGN);
    if (options.kept)
        open_kept();
    first = last_answer = now();
    last = first + options.seconds;
    if (options.rate > 0)
        open_loop();
    else
        closed_loop();
    finish();
    print_result();
    return 0;
}
