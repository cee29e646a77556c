/* The limit of the kernel: blocking sockets, in C.
 *
 * The protocol is that of common.py: the side and the descriptor are arguments, and each line of
 * JSON on standard input is a request, answered by one line. The requests are written by json.dumps
 * without any character that needs escaping, so searching for the keys is enough.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 253
#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

struct job {
    char name[64], variant[64], path[256];
    long count, size;
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void check(int right, const char *what)
{
    if (!right) {
        fprintf(stderr, "limit: %s\n", what);
        exit(1);
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void *filled(size_t size)
{
    void *buffer = malloc(size);
    if (!buffer)
        die("malloc");
    memset(buffer, 'x', size);
    return buffer;
}

static void send_bytes(int sock, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(sock, data, size, MSG_NOSIGNAL);
        if (sent < 0)
            die("send");
        data += sent;
        size -= sent;
    }
}

static void receive_bytes(int sock, char *buffer, size_t buffer_size, size_t size)
{
    while (size) {
        ssize_t received = recv(sock, buffer, size < buffer_size ? size : buffer_size, 0);
        if (received <= 0)
            die("recv");
        size -= received;
    }
}

static void send_byte(int sock)
{
    send_bytes(sock, "x", 1);
}

static void receive_byte(int sock)
{
    char byte;
    receive_bytes(sock, &byte, 1, 1);
}

static void send_fds(int sock, const int *fds, int count, const char *data, size_t size)
{
    union {
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec vector = {(void *)data, size};
    struct msghdr message = {0};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != (ssize_t)size)
        die("sendmsg");
}

static int receive_fds(int sock, int *fds, char *data, size_t size)
{
    union {
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec vector = {data, size};
    struct msghdr message = {0};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = sizeof control.bytes;
    if (recvmsg(sock, &message, MSG_CMSG_CLOEXEC) <= 0)
        die("recvmsg");
    check(!(message.msg_flags & MSG_CTRUNC), "descriptors were lost");
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    check(header && header->cmsg_type == SCM_RIGHTS, "expected descriptors");
    int count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(header), count * sizeof(int));
    return count;
}

static void close_each(const int *fds, int count)
{
    for (int i = 0; i < count; i++)
        close(fds[i]);
}

/* The cases: each plays one side, and returns seconds, which the right side's caller drops. */

static const int STDIN[MAX_FDS];

static double ping_pong(int sock, int left, const struct job *job, int fds, size_t size)
{
    int received[MAX_FDS];
    /* The buffer is larger than a message of many bytes, so that one read can return all of it. */
    char *data = filled(size), *buffer = filled(size > 1 ? 65536 : 1);
    size_t buffer_size = size > 1 ? 65536 : 1;
    double begin = now();
    for (long i = 0; i < job->count; i++) {
        if (left)
            send_fds(sock, STDIN, fds, data, size);
        int count = receive_fds(sock, received, buffer, buffer_size);
        if (!left)
            send_fds(sock, STDIN, fds, data, size);
        close_each(received, count);
    }
    begin = now() - begin;
    free(data);
    free(buffer);
    return begin;
}

static double one_way(int sock, int left, long total, int most)
{
    int received[MAX_FDS];
    char byte = 0;
    double begin = now();
    while (total) {
        int count = total < most ? total : most;
        if (left) {
            send_fds(sock, STDIN, count, "", 1);
        } else {
            count = receive_fds(sock, received, &byte, 1);
            close_each(received, count);
        }
        total -= count;
    }
    if (left)
        receive_byte(sock);
    else
        send_byte(sock);
    return now() - begin;
}

static void send_credentials(int sock)
{
    union {
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr align;
    } control;
    struct ucred own = {getpid(), geteuid(), getegid()};
    struct iovec vector = {"", 1};
    struct msghdr message = {0};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = sizeof control.bytes;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_CREDENTIALS;
    header->cmsg_len = CMSG_LEN(sizeof own);
    memcpy(CMSG_DATA(header), &own, sizeof own);
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != 1)
        die("sendmsg");
}

static void receive_credentials(int sock)
{
    union {
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr align;
    } control;
    char byte;
    int on = 1, off = 0;
    struct iovec vector = {&byte, 1};
    struct msghdr message = {0};
    message.msg_iov = &vector;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = sizeof control.bytes;
    /* As Gio does: on for this time, and off again. */
    setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &on, sizeof on);
    if (recvmsg(sock, &message, MSG_CMSG_CLOEXEC) != 1)
        die("recvmsg");
    setsockopt(sock, SOL_SOCKET, SO_PASSCRED, &off, sizeof off);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    check(header && header->cmsg_type == SCM_CREDENTIALS, "expected credentials");
}

static double credentials(int sock, int left, const struct job *job)
{
    double begin = now();
    for (long i = 0; i < job->count; i++) {
        if (left)
            send_credentials(sock);
        receive_credentials(sock);
        if (!left)
            send_credentials(sock);
    }
    return now() - begin;
}

static double bytes(int sock, int left, const struct job *job)
{
    char *data = filled(job->size), *buffer = filled(65536);
    double begin = now();
    for (long i = 0; i < job->count; i++) {
        if (left)
            send_bytes(sock, data, job->size);
        receive_bytes(sock, buffer, 65536, job->size);
        if (!left)
            send_bytes(sock, data, job->size);
    }
    begin = now() - begin;
    free(data);
    free(buffer);
    return begin;
}

static double buffer_sent(int sock, int left, const struct job *job)
{
    char *data = filled(left ? job->size : 65536);
    double begin = now();
    for (long i = 0; i < job->count; i++) {
        if (left) {
            send_bytes(sock, data, job->size);
            receive_byte(sock);
        } else {
            receive_bytes(sock, data, 65536, job->size);
            send_byte(sock);
        }
    }
    begin = now() - begin;
    free(data);
    return begin;
}

static double buffer_sealed(int sock, int left, const struct job *job)
{
    int memory = -1;
    char byte;
    if (left) {
        /* It is there already, and full: what is measured is handing it over. */
        char *data = filled(1 << 20);
        memory = memfd_create("benchmark", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        for (long done = 0; done < job->size;) {
            long rest = job->size - done;
            ssize_t written = write(memory, data, rest < 1 << 20 ? rest : 1 << 20);
            if (written <= 0)
                die("write");
            done += written;
        }
        free(data);
    }
    double begin = now();
    for (long i = 0; i < job->count; i++) {
        if (left) {
            int seals = fcntl(memory, F_GET_SEALS);
            if ((seals & SEALS) != SEALS && fcntl(memory, F_ADD_SEALS, SEALS) < 0)
                die("F_ADD_SEALS");
            send_fds(sock, &memory, 1, "", 1);
            receive_byte(sock);
        } else {
            int fds[MAX_FDS];
            struct stat status;
            receive_fds(sock, fds, &byte, 1);
            check((fcntl(fds[0], F_GET_SEALS) & SEALS) == SEALS, "not sealed");
            if (fstat(fds[0], &status) < 0 || status.st_size != job->size)
                die("fstat");
            char *view = mmap(NULL, job->size, PROT_READ, MAP_SHARED, fds[0], 0);
            if (view == MAP_FAILED)
                die("mmap");
            check(view[0] == view[job->size - 1], "not what was sent");
            close(fds[0]);
            send_byte(sock);
            munmap(view, job->size);
        }
    }
    begin = now() - begin;
    if (left)
        close(memory);
    return begin;
}

static struct sockaddr_un address_of(const struct job *job)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/accept", job->path);
    check(length < (int)sizeof address.sun_path, "the path is too long");
    return address;
}

static double connect_each(int sock, const struct job *job)
{
    struct sockaddr_un address = address_of(job);
    receive_byte(sock);
    double begin = now();
    for (long i = 0; i < job->count; i++) {
        int client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(client, (struct sockaddr *)&address, sizeof address) < 0)
            die("connect");
        receive_byte(client);
        close(client);
    }
    return now() - begin;
}

static double accept_each(int sock, const struct job *job)
{
    struct sockaddr_un address = address_of(job);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 128))
        die("bind");
    send_byte(sock);
    for (long i = 0; i < job->count; i++) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        struct ucred peer;
        socklen_t length = sizeof peer;
        if (client < 0 || getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &length))
            die("accept");
        if (peer.uid == geteuid())
            send_byte(client);
        close(client);
    }
    close(listener);
    unlink(address.sun_path);
    return 0;
}

static double run(int sock, int left, const struct job *job)
{
    const char *name = job->name;
    if (!strcmp(name, "one descriptor, ping-pong"))
        return ping_pong(sock, left, job, 1, 1);
    if (!strcmp(name, "one descriptor a message, one way"))
        return one_way(sock, left, job->count, 1);
    if (!strcmp(name, "many descriptors a message, one way"))
        return one_way(sock, left, job->count * job->size, job->size);
    if (!strcmp(name, "ten thousand descriptors"))
        return one_way(sock, left, job->size, MAX_FDS);
    if (!strcmp(name, "credentials, ping-pong"))
        return credentials(sock, left, job);
    if (!strcmp(name, "1 KiB and 2 descriptors, ping-pong"))
        return ping_pong(sock, left, job, 2, job->size);
    if (!strcmp(name, "bytes, ping-pong"))
        return bytes(sock, left, job);
    if (!strcmp(name, "a large buffer"))
        return (strcmp(job->variant, "the bytes") ? buffer_sealed : buffer_sent)(sock, left, job);
    if (!strcmp(name, "accept and check credentials"))
        return (left ? connect_each : accept_each)(sock, job);
    check(0, "an unknown case");
    return 0;
}

/* Requests and answers. */

static void text_of(const char *request, const char *key, char *buffer, size_t size)
{
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\": \"", key);
    const char *begin = strstr(request, quoted);
    check(begin != NULL, "a request without a key");
    begin += strlen(quoted);
    size_t length = strcspn(begin, "\"");
    check(length < size, "a value that is too long");
    memcpy(buffer, begin, length);
    buffer[length] = 0;
}

static long number_of(const char *request, const char *key)
{
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *begin = strstr(request, quoted);
    check(begin != NULL, "a request without a key");
    return strtol(begin + strlen(quoted), NULL, 10);
}

int main(int count, char **arguments)
{
    check(count == 3, "limit left|right FD");
    int left = !strcmp(arguments[1], "left"), sock = atoi(arguments[2]);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    puts("{\"one descriptor, ping-pong\": [\"\"], \"one descriptor a message, one way\": [\"\"], "
         "\"many descriptors a message, one way\": [\"\"], \"ten thousand descriptors\": [\"\"], "
         "\"credentials, ping-pong\": [\"\"], \"1 KiB and 2 descriptors, ping-pong\": [\"\"], "
         "\"bytes, ping-pong\": [\"\"], \"a large buffer\": [\"sealed memory\", \"the bytes\"], "
         "\"accept and check credentials\": [\"\"]}");
    fflush(stdout);
    char request[1024];
    while (fgets(request, sizeof request, stdin)) {
        struct job job;
        char greeting;
        text_of(request, "case", job.name, sizeof job.name);
        text_of(request, "variant", job.variant, sizeof job.variant);
        text_of(request, "path", job.path, sizeof job.path);
        job.count = number_of(request, "count");
        job.size = number_of(request, "size");
        /* What the other side takes to start is not counted. */
        if (left)
            check(read(sock, &greeting, 1) == 1 && greeting == '!', "no greeting");
        else
            check(write(sock, "!", 1) == 1, "no greeting sent");
        double seconds = run(sock, left, &job);
        if (left)
            printf("{\"seconds\": %.9f}\n", seconds);
        else
            puts("{}");
        fflush(stdout);
    }
    return 0;
}
