/* A peer that means harm: random control messages, lengths, kinds and ends.
 *
 *   hostile FD SEED COUNT
 *
 * FD is a connected SOCK_SEQPACKET socket. For each byte that comes from there, one end of a
 * new stream connection goes there, and random messages go into the other end, until this
 * peer has had enough of that connection or the other side has. After COUNT messages that the
 * kernel took, "SENT REFUSED" goes to FD: how many it took and how many it did not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#define MOST_DATA 65536
#define MOST_CONTROL 8192

static uint64_t state;

static uint32_t below(uint32_t limit)
{
    /* splitmix64: the same everywhere for the same seed. */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(((z ^ (z >> 31)) >> 32) % limit);
}

static int pool[64];
static int pooled;

static void keep(int fd)
{
    /* What this kernel or this user may not open is left out. */
    if (fd >= 0 && pooled < 64)
        pool[pooled++] = fd;
}

static int memory(unsigned flags, int size, int seals)
{
    int fd = memfd_create("hostile", flags);
    if (fd >= 0 && (ftruncate(fd, size) || (seals && fcntl(fd, F_ADD_SEALS, seals)))) {
        close(fd);
        return -1;
    }
    return fd;
}

static void fill_pool(void)
{
    int two[2], fd;
    char path[64];
    const int all = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

    keep(open("/proc/self/exe", O_RDONLY));
    keep(open("/proc/self/exe", O_PATH));
    keep(open("/", O_RDONLY | O_DIRECTORY));
    keep(open("/dev/null", O_RDWR));
    /* Its position can be a negative number. */
    fd = open("/proc/self/mem", O_RDWR);
    keep(fd);
    lseek(fd, (off_t)-4096, SEEK_SET);
    keep(open("/proc/self/status", O_RDONLY));
    if (!pipe(two)) {
        keep(two[0]);
        keep(two[1]);
    }
    if (!socketpair(AF_UNIX, SOCK_STREAM, 0, two)) {
        keep(two[0]);
        keep(two[1]);
    }
    if (!socketpair(AF_UNIX, SOCK_DGRAM, 0, two)) {
        keep(two[0]);
        close(two[1]);
    }
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    keep(fd);
    /* A socket by its looks, but opened as a path only: no call for sockets works on it. */
    snprintf(path, sizeof path, "hostile.%d.socket", (int)getpid());
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strcpy(name.sun_path, path);
    if (!bind(fd, (struct sockaddr *)&name, sizeof name)) {
        keep(open(path, O_PATH));
        unlink(path);
    }
    fd = socket(AF_INET, SOCK_STREAM, 0);
    keep(fd);
    listen(fd, 1);
    keep(socket(AF_INET, SOCK_DGRAM, 0));
    keep(socket(AF_NETLINK, SOCK_RAW, 0));
    /* Types and families that Python has no name for, or that cannot tell their own. */
    keep(socket(AF_PACKET, SOCK_RAW, 0));
    keep(socket(AF_INET, SOCK_PACKET, 0));
    keep(socket(AF_VSOCK, SOCK_STREAM, 0));
    keep(socket(44 /* AF_XDP */, SOCK_RAW, 0));
    keep(socket(AF_ALG, SOCK_SEQPACKET, 0));
    keep(memory(0, 4096, 0));
    keep(memory(MFD_ALLOW_SEALING, 4096, F_SEAL_WRITE));
    keep(memory(MFD_ALLOW_SEALING, 4096, all));
    keep(memory(MFD_ALLOW_SEALING, 0, all));
    keep(memory(MFD_ALLOW_SEALING, 1 << 30, all));
    keep(memory(MFD_ALLOW_SEALING | MFD_HUGETLB, 2 << 20, all));
    /* Sealed as it should be, but open for writing only. */
    fd = memory(MFD_ALLOW_SEALING, 4096, 0);
    if (fd >= 0) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        keep(open(path, O_WRONLY));
        fcntl(fd, F_ADD_SEALS, all);
        close(fd);
    }
    keep(epoll_create1(0));
    keep(eventfd(0, 0));
    keep(inotify_init());
    keep(timerfd_create(CLOCK_MONOTONIC, 0));
    sigset_t none;
    sigemptyset(&none);
    keep(signalfd(-1, &none, 0));
    keep((int)syscall(SYS_pidfd_open, getpid(), 0));
}

static unsigned descriptors(void)
{
    switch (below(20)) {
    case 0: return 0;
    case 1: return 253;
    case 2: return below(256);
    case 3: case 4: case 5: case 6: return 2 + below(15);
    default: return 1;
    }
}

static size_t data_size(void)
{
    unsigned roll = below(100);
    if (roll < 60) return 1;
    if (roll < 63) return 0;
    if (roll < 82) return 2 + below(15);
    if (roll < 94) return below(1025);
    if (roll < 98) return below(8193);
    return below(MOST_DATA + 1);
}

/* Write one control message; return the room that it takes. */
static size_t one_control(char *at, int conn)
{
    struct cmsghdr *header = (struct cmsghdr *)at;
    unsigned roll = below(100), count = descriptors();
    size_t size = sizeof(int) * count;

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    for (unsigned i = 0; i < count; i++) {
        int fd = below(50) ? pool[below((uint32_t)pooled)] : conn;
        memcpy(CMSG_DATA(header) + sizeof(int) * i, &fd, sizeof fd);
    }
    if (roll < 12) {
        struct ucred claimed = {.pid = getpid(), .uid = getuid(), .gid = getgid()};
        if (!below(4))
            claimed.pid = (pid_t)below(70000);
        if (!below(8))
            claimed.uid = below(3) - 1;
        header->cmsg_type = SCM_CREDENTIALS;
        size = sizeof claimed + (below(8) ? 0 : below(8));
        memcpy(CMSG_DATA(header), &claimed, sizeof claimed);
    } else if (roll < 17) {
        /* Kinds that are not for sending, and levels that the kernel passes over. */
        header->cmsg_type = (int)below(8);
        header->cmsg_level = below(2) ? SOL_SOCKET : (int)below(300);
    } else if (roll < 20) {
        /* Closed, or never open. */
        int fd = below(2) ? -1 - (int)below(30) : 900 + (int)below(100);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    } else if (roll < 25) {
        size += 1 + below(3);
    }
    header->cmsg_len = CMSG_LEN(size);
    if (roll == 25)
        header->cmsg_len = below(sizeof(struct cmsghdr));
    else if (roll == 26)
        header->cmsg_len += 8 + below(100000);
    return CMSG_SPACE(size);
}

static ssize_t one_message(int conn, char *data)
{
    static _Alignas(struct cmsghdr) char control[MOST_CONTROL];
    struct iovec part = {.iov_base = data, .iov_len = data_size()};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control};
    unsigned roll = below(20), headers = roll < 6 ? 0 : roll < 16 ? 1 : roll < 18 ? 2 : below(9);
    size_t length = 0;

    memset(control, 0, sizeof control);
    for (unsigned i = 0; i < headers && length < MOST_CONTROL - 1200; i++)
        length += one_control(control + length, conn);
    message.msg_controllen = below(60) ? length : length / 2;
    return sendmsg(conn, &message, MSG_NOSIGNAL | (below(50) ? 0 : MSG_OOB));
}

/* Open a new connection, of which the other side gets one end; return ours. */
static int connection(int control)
{
    char byte, room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room,
                             .msg_controllen = sizeof room};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    int two[2];

    if (read(control, &byte, 1) != 1 || socketpair(AF_UNIX, SOCK_STREAM, 0, two))
        exit(1);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &two[1], sizeof(int));
    while (sendmsg(control, &message, MSG_NOSIGNAL) != 1) {
        /* Other processes of this user have too many in flight. */
        if (errno != ETOOMANYREFS)
            exit(1);
        usleep(1000);
    }
    close(two[1]);
    return two[0];
}

int main(int argc, char **argv)
{
    static char data[MOST_DATA];
    char report[64];
    long sent = 0, refused = 0;

    if (argc != 4)
        return 2;
    int control = atoi(argv[1]), conn = -1;
    state = strtoull(argv[2], NULL, 10);
    long count = atol(argv[3]);
    fill_pool();
    while (sent < count) {
        if (conn < 0)
            conn = connection(control);
        if (one_message(conn, data) >= 0)
            sent++;
        else if (errno == EPIPE || errno == ECONNRESET || !below(100)) {
            close(conn);
            conn = -1;
            continue;
        } else
            refused++;
        unsigned roll = below(200);
        if (roll < 2)
            shutdown(conn, roll ? SHUT_RDWR : SHUT_WR);
        if (roll < 5) {
            close(conn);
            conn = -1;
        }
    }
    if (conn >= 0)
        close(conn);
    if (read(control, data, 1) != 1)
        return 1;
    int length = snprintf(report, sizeof report, "%ld %ld", sent, refused);
    return send(control, report, (size_t)length, MSG_NOSIGNAL) == length ? 0 : 1;
}
