/* LD_PRELOAD: a kernel that takes back, in the middle of a transfer, an offload that it had granted.
 *
 * REFUSE_GSO_AFTER=N   sendmmsg fails with EIO at a message with UDP_SEGMENT, once N such went out.
 * REFUSE_GSO_ABOVE=N   sendmmsg fails with EINVAL at a message of segments of more than N bytes, as older
 *                      kernels do above the path's MTU.
 * REFUSE_JOIN_AFTER=N  writev fails with EINVAL at a frame whose vnet header has a gso_type, once N went in.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

static long left(const char *name, long *state)
{
    if (*state == 0) {
        const char *text = getenv(name);
        *state = text ? atol(text) + 1 : -1;
    }
    return *state;
}

/* The size of the message's segments, 0 without UDP_SEGMENT. */
static uint16_t segment_of(struct msghdr *message)
{
    struct cmsghdr *control = CMSG_FIRSTHDR(message);
    uint16_t size = 0;
    for (; control; control = CMSG_NXTHDR(message, control))
        if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == 103)
            memcpy(&size, CMSG_DATA(control), sizeof size);
    return size;
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
    static int (*real)(int, struct mmsghdr *, unsigned int, int);
    static long state, above;
    long limit = left("REFUSE_GSO_ABOVE", &above) - 1;
    unsigned int i;
    if (!real)
        real = dlsym(RTLD_NEXT, "sendmmsg");
    left("REFUSE_GSO_AFTER", &state);
    for (i = 0; i < count; i++) {
        uint16_t segment = segment_of(&messages[i].msg_hdr);
        int too_long = limit >= 0 && segment > limit;
        if (!segment || (!too_long && state < 0))
            continue;
        if (too_long || state == 1) {
            if (i)
                return real(fd, messages, i, flags);
            errno = too_long ? EINVAL : EIO;
            return -1;
        }
        state--;
    }
    return real(fd, messages, count, flags);
}

ssize_t writev(int fd, const struct iovec *vectors, int count)
{
    static ssize_t (*real)(int, const struct iovec *, int);
    static long state;
    if (!real)
        real = dlsym(RTLD_NEXT, "writev");
    if (left("REFUSE_JOIN_AFTER", &state) > 0 && count > 2 && vectors[0].iov_len == 10
        && ((const unsigned char *)vectors[0].iov_base)[1]) {
        if (state == 1) {
            errno = EINVAL;
            return -1;
        }
        state--;
    }
    return real(fd, vectors, count);
}
