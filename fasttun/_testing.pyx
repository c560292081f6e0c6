"""Python faces of the per-packet helpers, for property tests and benchmarks. Not for use: nothing in the
package imports it, and it may change with any version.

Every buffer handed to a helper is allocated at its exact size: a sanitizer sees the first byte past it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from fasttun._native.aead cimport (
    ft_aead_backend, ft_aead_backend_at, ft_aead_init, ft_aead_key, ft_aead_packet, ft_aead_select, ft_aead_wipe,
    ft_open, ft_seal,
)
from fasttun._native.allowedips cimport (
    allowedips_free, allowedips_init, allowedips_insert, allowedips_lookup, allowedips_remove,
    allowedips_remove_peer, allowedips_t,
)
from fasttun._native.checksum cimport (
    ft_checksum_force, ft_checksum_variant, ft_checksum_variant_at, ft_copy_sum, ft_fold, ft_pseudo_v4,
    ft_pseudo_v6, ft_store16, ft_sum,
)
from fasttun._native.coalesce cimport (
    COALESCE_MAX_PACKETS, coalesced_frame_t, coalescer_add, coalescer_finish, coalescer_init, coalescer_reset,
    coalescer_t,
)
from fasttun._native.packet cimport address_t
from fasttun._native.replay cimport replay_check, replay_init, replay_mark, replay_t
from fasttun._native.segment cimport (
    SEGMENT_BAD_CHECKSUM, SEGMENT_BAD_GSO, SEGMENT_BAD_HEADER, SEGMENT_NO_ROOM, SEGMENT_TOO_LONG,
    complete_checksum, segment_frame, segment_out_size, segments_t,
)
from fasttun._native.system cimport precise_ns
from fasttun._native.vnet cimport VNET_HEADER_LENGTH, vnet_header_t

BURST_PACKETS = COALESCE_MAX_PACKETS

_REASONS = {
    SEGMENT_BAD_HEADER: "bad header",
    SEGMENT_BAD_CHECKSUM: "bad checksum offsets",
    SEGMENT_BAD_GSO: "bad gso",
    SEGMENT_TOO_LONG: "too long",
    SEGMENT_NO_ROOM: "no room",
}


cdef uint8_t *_copied(bytes data) except NULL:
    cdef uint8_t *copy = <uint8_t *>malloc(len(data) if data else 1)
    if copy == NULL:
        raise MemoryError
    memcpy(copy, PyBytes_AS_STRING(data), len(data))
    return copy


def checksum_variants():
    """Names of the checksum variants that this processor supports, best first."""
    names = []
    while ft_checksum_variant_at(len(names)) != NULL:
        names.append(ft_checksum_variant_at(len(names)).decode())
    return names


def checksum_variant():
    """Name of the variant in use."""
    return ft_checksum_variant().decode()


cdef int _force(variant) except -1:
    cdef bytes name
    if variant is None:
        return ft_checksum_force(NULL)
    name = variant.encode()
    if ft_checksum_force(name) < 0:
        raise ValueError(f"this processor has no {variant}")
    return 0


def checksum(bytes data not None, variant=None, initial=0, size_t misalignment=0):
    """Folded sum of `data` in network order, not inverted. variant: a name of `checksum_variants()`."""
    cdef uint8_t *copy
    cdef uint64_t sum
    cdef uint64_t start = initial
    cdef uint8_t folded[2]
    _force(variant)
    copy = _copied(bytes(misalignment) + data)
    sum = ft_sum(copy + misalignment, len(data), start)
    free(copy)
    _force(None)
    ft_store16(folded, ft_fold(sum))
    return folded[0] << 8 | folded[1]


def copy_checksum(bytes data not None, variant=None):
    """`(copy, folded sum)` by the fused pass."""
    cdef uint8_t *source
    cdef uint64_t sum
    cdef uint8_t folded[2]
    cdef bytes copy = PyBytes_FromStringAndSize(NULL, len(data))
    cdef uint8_t *target
    _force(variant)
    source = _copied(data)
    target = _copied(data)
    memset(target, 0xa5, len(data))
    sum = ft_copy_sum(target, source, len(data), 0)
    memcpy(PyBytes_AS_STRING(copy), target, len(data))
    free(source)
    free(target)
    _force(None)
    ft_store16(folded, ft_fold(sum))
    return copy, folded[0] << 8 | folded[1]


def pseudo_header(bytes addresses not None, int protocol, int length):
    """Folded pseudo-header sum in network order; `addresses` is 8 or 32 bytes long."""
    cdef uint8_t folded[2]
    cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(addresses)
    if len(addresses) == 8:
        ft_store16(folded, ft_fold(ft_pseudo_v4(start, protocol, length)))
    elif len(addresses) == 32:
        ft_store16(folded, ft_fold(ft_pseudo_v6(start, protocol, length)))
    else:
        raise ValueError("addresses: 8 or 32 bytes")
    return folded[0] << 8 | folded[1]


cdef int _vnet(bytes data, vnet_header_t *vnet) except -1:
    if len(data) != VNET_HEADER_LENGTH:
        raise ValueError("vnet: 10 bytes")
    memcpy(vnet, PyBytes_AS_STRING(data), VNET_HEADER_LENGTH)
    return 0


def split(bytes vnet not None, bytes frame not None, size_t max_packet=65535, size_t head_room=0,
          size_t tail_room=0, out_size=None):
    """The packets that one frame is split to. Raises ValueError(reason)."""
    cdef vnet_header_t header
    cdef segments_t segments
    cdef size_t room, i, length
    cdef uint8_t *source
    cdef uint8_t *out
    cdef int count
    _vnet(vnet, &header)
    room = segment_out_size(head_room, tail_room) if out_size is None else out_size
    out = <uint8_t *>malloc(room if room else 1)
    if out == NULL:
        raise MemoryError
    if head_room or tail_room:
        memset(out, 0xa5, room)
    source = _copied(frame)
    count = segment_frame(
        &header, source, len(frame), out, room, head_room, tail_room, max_packet, &segments)
    free(source)
    try:
        if count < 0:
            raise ValueError(_REASONS.get(count))
        packets = []
        for i in range(segments.count):
            length = segments.packet_length if i + 1 < segments.count else segments.last_length
            for at in list(range(i * segments.stride, i * segments.stride + head_room)) + \
                    list(range(i * segments.stride + head_room + length,
                               i * segments.stride + head_room + length + tail_room)):
                if out[<size_t>at] != 0xa5:
                    raise AssertionError("a packet's room was written")
            packets.append(PyBytes_FromStringAndSize(<char *>out + i * segments.stride + head_room, length))
        return packets
    finally:
        free(out)


def complete(bytes vnet not None, bytes packet not None):
    """The packet with its partial checksum finished in place. Raises ValueError(reason)."""
    cdef vnet_header_t header
    cdef uint8_t *copy
    cdef int result
    _vnet(vnet, &header)
    copy = _copied(packet)
    result = complete_checksum(&header, copy, len(packet))
    try:
        if result < 0:
            raise ValueError(_REASONS.get(result))
        return PyBytes_FromStringAndSize(<char *>copy, len(packet))
    finally:
        free(copy)


cdef class Coalescer:
    """One coalescer and one burst of packets in it."""

    cdef coalescer_t *_coalescer
    cdef list _packets
    cdef uint8_t *_memory[COALESCE_MAX_PACKETS]
    cdef size_t _held

    def __cinit__(self, *, bint join_tcp=True, bint join_udp=True, bint join_fixed_ids=False):
        self._held = 0
        self._coalescer = <coalescer_t *>malloc(sizeof(coalescer_t))
        if self._coalescer == NULL:
            raise MemoryError
        coalescer_init(self._coalescer, join_tcp, join_udp, join_fixed_ids)

    def __dealloc__(self):
        self._release()
        free(self._coalescer)

    cdef void _release(self) noexcept:
        cdef size_t i
        for i in range(self._held):
            free(self._memory[i])
        self._held = 0

    def join(self, list packets not None):
        """`(vnet header, frame, packets joined)` for each frame of one burst, in order."""
        cdef coalesced_frame_t *frame
        cdef uint8_t *copy
        cdef size_t i, j, at
        cdef bytes whole
        self._release()
        coalescer_reset(self._coalescer)
        if len(packets) > COALESCE_MAX_PACKETS:
            raise ValueError(f"at most {COALESCE_MAX_PACKETS} packets a burst")
        for packet in packets:
            copy = _copied(packet)
            self._memory[self._held] = copy
            self._held += 1
            if coalescer_add(self._coalescer, copy, <uint16_t>len(packet)) < 0:
                raise AssertionError("full before its limit")
        frames = []
        for i in range(coalescer_finish(self._coalescer)):
            frame = &self._coalescer.frames[i]
            whole = PyBytes_FromStringAndSize(NULL, VNET_HEADER_LENGTH + frame.length)
            at = 0
            for j in range(frame.iov_count):
                if at + frame.iov[j].iov_len > <size_t>len(whole):
                    raise AssertionError("iovecs are longer than the frame")
                memcpy(PyBytes_AS_STRING(whole) + at, frame.iov[j].iov_base, frame.iov[j].iov_len)
                at += frame.iov[j].iov_len
            if at != <size_t>len(whole):
                raise AssertionError("iovecs are shorter than the frame")
            frames.append((whole[:VNET_HEADER_LENGTH], whole[VNET_HEADER_LENGTH:], frame.packets))
        return frames


def join(list packets not None, join_udp=True, join_tcp=True, join_fixed_ids=False):
    """`[(vnet header, frame)]` of one burst of at most BURST_PACKETS packets."""
    coalescer = Coalescer(join_tcp=join_tcp, join_udp=join_udp, join_fixed_ids=join_fixed_ids)
    return [(vnet, frame) for vnet, frame, _ in coalescer.join(packets)]


AEAD_TAG = 16


def aead_backends():
    """Names of the AEAD's back ends that work here, best first."""
    names = []
    while ft_aead_backend_at(len(names)) != NULL:
        names.append(ft_aead_backend_at(len(names)).decode())
    return names


def aead_backend():
    """Name of the back end in use."""
    return ft_aead_backend().decode()


cdef class AeadKey:
    """A key for data packets. backend: a name of `aead_backends()`."""

    cdef ft_aead_key _key

    def __cinit__(self, bytes key not None, backend=None):
        cdef bytes name
        cdef int chosen
        memset(&self._key, 0, sizeof(self._key))
        if len(key) != 32:
            raise ValueError("a key has 32 bytes")
        if backend is None:
            chosen = ft_aead_select(NULL)
        else:
            name = backend.encode()
            chosen = ft_aead_select(name)
        if chosen < 0:
            raise ValueError(f"there is no {backend} here")
        chosen = ft_aead_init(&self._key, <const uint8_t *>PyBytes_AS_STRING(key))
        ft_aead_select(NULL)
        if chosen < 0:
            raise MemoryError

    def __dealloc__(self):
        ft_aead_wipe(&self._key)

    def wipe(self):
        ft_aead_wipe(&self._key)

    def memory(self):
        """The bytes of the structure itself."""
        return PyBytes_FromStringAndSize(<char *>&self._key, sizeof(self._key))

    def seal(self, list packets not None, bytes margin=b""):
        """packets: (counter, plaintext) each, in one batch.

        Returns (ok, memory) each: the packet with its tag, between two copies of `margin`.
        """
        return self._work(packets, margin, False)

    def open(self, list packets not None, bytes margin=b""):
        """The same for (counter, sealed packet); memory: as long as what was given, tag and all."""
        return self._work(packets, margin, True)

    cdef list _work(self, list packets, bytes margin, bint opening):
        cdef size_t count = len(packets), i, room, before = len(margin)
        cdef ft_aead_packet *batch = <ft_aead_packet *>calloc(count + 1, sizeof(ft_aead_packet))
        cdef bytes data
        results = []
        if batch == NULL:
            raise MemoryError
        try:
            for i in range(count):
                counter, data = packets[i]
                batch[i].counter = counter
                batch[i].length = len(data)
                batch[i].ok = 0xdead
                data = margin + data + bytes(0 if opening else AEAD_TAG) + margin
                batch[i].data = _copied(data) + before
            with nogil:
                if opening:
                    ft_open(&self._key, batch, count)
                else:
                    ft_seal(&self._key, batch, count)
            for i in range(count):
                room = 2 * before + batch[i].length + (0 if opening else AEAD_TAG)
                results.append((batch[i].ok, PyBytes_FromStringAndSize(<char *>batch[i].data - before, room)))
        finally:
            for i in range(count):
                if batch[i].data != NULL:
                    free(batch[i].data - before)
            free(batch)
        return results

    def repeat(self, int length, int count, int times, bint opening=False):
        """Seals, or opens, `count` packets of `length` bytes of plaintext `times` times. Opening needs them
        sealed again each time, so the seconds that it took are returned: (seconds, packets found authentic)."""
        cdef size_t stride = length + AEAD_TAG
        cdef uint8_t *memory = <uint8_t *>calloc(count, stride)
        cdef ft_aead_packet *batch = <ft_aead_packet *>calloc(count, sizeof(ft_aead_packet))
        cdef int _, i
        cdef uint64_t began, spent_ns = 0
        cdef uint64_t counter = 0, authentic = 0
        if memory == NULL or batch == NULL:
            free(memory)
            free(batch)
            raise MemoryError
        with nogil:
            for _ in range(times):
                for i in range(count):
                    batch[i].data = memory + i * stride
                    batch[i].length = length
                    batch[i].counter = counter
                    counter += 1
                began = precise_ns()
                ft_seal(&self._key, batch, count)
                if opening:
                    for i in range(count):
                        batch[i].length = stride
                    began = precise_ns()
                    ft_open(&self._key, batch, count)
                spent_ns += precise_ns() - began
                for i in range(count):
                    authentic += batch[i].ok
        free(memory)
        free(batch)
        return spent_ns / 1e9, authentic


cdef class AllowedIPs:
    """One table of allowed IPs. Addresses and prefixes: 16 bytes, IPv4 as v4-mapped with bits + 96."""

    cdef allowedips_t _table

    def __cinit__(self):
        allowedips_init(&self._table)

    def __dealloc__(self):
        allowedips_free(&self._table)

    def __len__(self):
        return self._table.count

    def insert(self, bytes prefix not None, int bits, int32_t peer):
        cdef address_t address
        _address(prefix, &address)
        if allowedips_insert(&self._table, &address, bits, peer) < 0:
            raise MemoryError

    def remove(self, bytes prefix not None, int bits, int32_t peer):
        """Whether it was there, and this peer's."""
        cdef address_t address
        _address(prefix, &address)
        return bool(allowedips_remove(&self._table, &address, bits, peer))

    def remove_peer(self, int32_t peer):
        allowedips_remove_peer(&self._table, peer)

    def lookup(self, bytes address not None):
        """The peer, -1 for none."""
        cdef address_t wanted
        _address(address, &wanted)
        return allowedips_lookup(&self._table, &wanted)

    def repeat_lookup(self, bytes addresses not None, int times):
        """For benchmarks: looks each of the addresses (16 bytes each) up, `times` times; a sum of the answers."""
        cdef const uint8_t *start = <const uint8_t *>PyBytes_AS_STRING(addresses)
        cdef Py_ssize_t i, count = len(addresses) // 16
        cdef address_t wanted
        cdef int64_t total = 0
        cdef int _
        with nogil:
            for _ in range(times):
                for i in range(count):
                    memcpy(&wanted, start + 16 * i, 16)
                    total += allowedips_lookup(&self._table, &wanted)
        return total


cdef int _address(bytes data, address_t *to) except -1:
    if len(data) != 16:
        raise ValueError("address: 16 bytes")
    memcpy(to, PyBytes_AS_STRING(data), 16)
    return 0


cdef class ReplayFilter:
    """The engine's replay window of one keypair."""

    cdef replay_t _window

    def __cinit__(self):
        replay_init(&self._window)

    def check(self, uint64_t counter):
        return bool(replay_check(&self._window, counter))

    def mark(self, uint64_t counter):
        """Whether it was new."""
        return bool(replay_mark(&self._window, counter))


# ---- For benchmarks: the helper alone, in a loop without Python ------------------------------------------


def repeat_checksum(bytes data not None, int times, variant=None, bint copy=False):
    """Sums `data` `times` times; copy: into a second buffer at the same time."""
    cdef uint8_t *source
    cdef uint8_t *target
    cdef uint64_t sum = 0
    cdef size_t length = len(data)
    cdef int _
    _force(variant)
    source = _copied(data)
    target = _copied(data)
    with nogil:
        for _ in range(times):
            if copy:
                sum = ft_copy_sum(target, source, length, sum)
            else:
                sum = ft_sum(source, length, sum)
    free(source)
    free(target)
    _force(None)
    return ft_fold(sum)


cdef extern from *:
    """
    static void copied_in_loop(uint8_t *to, const uint8_t *from, size_t length, int times) {
        while (times-- > 0) {
            memcpy(to, from, length);
            __asm__ volatile("" : : "r"(to), "r"(from) : "memory");
        }
    }
    """
    void copied_in_loop(uint8_t *to, const uint8_t *source, size_t length, int times) noexcept nogil


def repeat_memcpy(bytes data not None, int times):
    """Copies `data` `times` times: the yardstick."""
    cdef uint8_t *source = _copied(data)
    cdef uint8_t *target = _copied(data)
    cdef size_t length = len(data)
    with nogil:
        copied_in_loop(target, source, length, times)
    free(source)
    free(target)


def repeat_split(bytes vnet not None, bytes frame not None, int times):
    """Splits one frame `times` times: packets made in all."""
    cdef vnet_header_t header
    cdef segments_t segments
    cdef size_t length = len(frame), room = segment_out_size(0, 0)
    cdef uint8_t *source
    cdef uint8_t *out
    cdef int _, count = 0
    cdef long packets = 0
    _vnet(vnet, &header)
    source = _copied(frame)
    out = <uint8_t *>malloc(room)
    if out == NULL:
        free(source)
        raise MemoryError
    with nogil:
        for _ in range(times):
            count = segment_frame(&header, source, length, out, room, 0, 0, 65535, &segments)
            packets += count
    free(source)
    free(out)
    if count < 0:
        raise ValueError(_REASONS.get(count))
    return packets


def repeat_join(list packets not None, int times):
    """Joins one burst `times` times (headers restored before each): frames made by the last.

    The packets lie one behind the other in memory, as a GRO read leaves them.
    """
    cdef coalescer_t *coalescer = <coalescer_t *>malloc(sizeof(coalescer_t))
    cdef bytes whole = b"".join(packets)
    cdef uint8_t *memory = _copied(whole)
    cdef uint8_t *start
    cdef const uint8_t *original = <const uint8_t *>PyBytes_AS_STRING(whole)
    cdef uint16_t lengths[COALESCE_MAX_PACKETS]
    cdef int _, i, j, count = len(packets)
    cdef size_t offset, first
    cdef unsigned int frames = 0
    if coalescer == NULL or count > COALESCE_MAX_PACKETS:
        raise MemoryError
    for i in range(count):
        lengths[i] = len(packets[i])
    coalescer_init(coalescer, True, True, False)
    with nogil:
        for _ in range(times):
            coalescer_reset(coalescer)
            offset = 0
            for j in range(count):
                coalescer_add(coalescer, memory + offset, lengths[j])
                offset += lengths[j]
            frames = coalescer_finish(coalescer)
            for j in range(<int>frames):
                start = <uint8_t *>coalescer.frames[j].iov[1].iov_base
                first = start - memory
                if coalescer.frames[j].packets > 1:
                    memcpy(start, original + first, coalescer.frames[j].vnet.hdr_len)
    free(memory)
    free(coalescer)
    return frames
