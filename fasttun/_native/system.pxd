# What the loop asks of Linux: only the calls, structures and fields that are used.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/udp.h>
    #include <poll.h>
    #include <pthread.h>
    #include <sched.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/socket.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef SOL_UDP
    #define SOL_UDP 17
    #endif
    #ifndef UDP_SEGMENT
    #define UDP_SEGMENT 103
    #endif
    #ifndef UDP_GRO
    #define UDP_GRO 104
    #endif

    #define ft_load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define ft_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define ft_add_relaxed(p, v) __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
    """
    uint64_t load_u64 "ft_load_relaxed"(const uint64_t *) noexcept nogil
    void store_u64 "ft_store_relaxed"(uint64_t *, uint64_t) noexcept nogil
    int load_int "ft_load_relaxed"(const int *) noexcept nogil
    void store_int "ft_store_relaxed"(int *, int) noexcept nogil
    void add_int "ft_add_relaxed"(int *, int) noexcept nogil

    int errno

    ctypedef long ssize_t

    enum:
        AF_INET
        AF_INET6
        IPPROTO_IP
        IPPROTO_IPV6
        IP_PKTINFO
        IPV6_PKTINFO
        SOL_UDP
        UDP_SEGMENT
        UDP_GRO
        SOL_SOCKET
        SO_TYPE
        SOCK_DGRAM
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        POLLIN
        POLLOUT
        POLLERR
        POLLHUP
        POLLNVAL
        CLOCK_MONOTONIC
        CLOCK_MONOTONIC_COARSE
        CLOCK_REALTIME
        EFD_NONBLOCK
        EFD_CLOEXEC

    # Each errno the loop tells apart.
    enum:
        EADDRNOTAVAIL
        EAGAIN
        EBADF
        EBADFD
        ECONNREFUSED
        EINTR
        EINVAL
        EIO
        EMSGSIZE
        ENETUNREACH
        ENOBUFS
        ENODEV
        ENOTCONN
        ENOTSOCK
        EPIPE
        EOPNOTSUPP

    struct iovec:
        void *iov_base
        size_t iov_len

    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port

    struct sockaddr_in6:
        uint16_t sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        uint32_t sin6_scope_id

    struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags

    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type

    cmsghdr *CMSG_FIRSTHDR(msghdr *) noexcept nogil
    cmsghdr *CMSG_NXTHDR(msghdr *, cmsghdr *) noexcept nogil
    unsigned char *CMSG_DATA(cmsghdr *) noexcept nogil
    size_t CMSG_LEN(size_t) noexcept nogil
    size_t CMSG_SPACE(size_t) noexcept nogil

    struct pollfd:
        int fd
        short events
        short revents

    struct timespec:
        long tv_sec
        long tv_nsec

    ctypedef struct pthread_mutex_t:
        pass

    int pthread_mutex_init(pthread_mutex_t *, void *) noexcept nogil
    int pthread_mutex_destroy(pthread_mutex_t *) noexcept nogil
    int pthread_mutex_lock(pthread_mutex_t *) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t *) noexcept nogil

    ssize_t read(int, void *, size_t) noexcept nogil
    ssize_t write(int, const void *, size_t) noexcept nogil
    ssize_t readv(int, const iovec *, int) noexcept nogil
    ssize_t writev(int, const iovec *, int) noexcept nogil
    int close(int) noexcept nogil
    int poll(pollfd *, unsigned long, int) noexcept nogil
    int sched_yield() noexcept nogil
    int sendmmsg(int, mmsghdr *, unsigned int, int) noexcept nogil
    int recvmmsg(int, mmsghdr *, unsigned int, int, timespec *) noexcept nogil
    ssize_t sendmsg(int, const msghdr *, int) noexcept nogil
    ssize_t sendto(int, const void *, size_t, int, const void *, unsigned int) noexcept nogil
    int clock_gettime(int, timespec *) noexcept nogil
    int eventfd(unsigned int, int) noexcept nogil
    int getsockopt(int, int, int, void *, unsigned int *) noexcept nogil
    int setsockopt(int, int, int, const void *, unsigned int) noexcept nogil

    void *memcpy(void *, const void *, size_t) noexcept nogil
    void *memset(void *, int, size_t) noexcept nogil
    int memcmp(const void *, const void *, size_t) noexcept nogil

    uint16_t htons(uint16_t) noexcept nogil
    uint16_t ntohs(uint16_t) noexcept nogil
    uint32_t htonl(uint32_t) noexcept nogil
    uint32_t ntohl(uint32_t) noexcept nogil


cdef inline uint64_t now_ns() noexcept nogil:
    """Coarse monotonic time: a few nanoseconds to read, a scheduler tick (1 to 10 ms) fine."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef inline uint64_t precise_ns() noexcept nogil:
    """Monotonic time to the nanosecond: some 20 ns to read."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef inline uint64_t realtime_ns() noexcept nogil:
    """Nanoseconds since 1970."""
    cdef timespec t
    clock_gettime(CLOCK_REALTIME, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec
