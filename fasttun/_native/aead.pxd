# ChaCha20-Poly1305 for data packets: the face of aead.h, which says how it works.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "_native/aead.h" nogil:
    ctypedef struct ft_aead_key:
        uint8_t[32] bytes

    ctypedef struct ft_aead_packet:
        uint8_t *data
        uint32_t length
        uint32_t ok
        uint64_t counter

    int ft_aead_init(ft_aead_key *key, const uint8_t *bytes) noexcept
    void ft_aead_wipe(ft_aead_key *key) noexcept
    void ft_seal(ft_aead_key *key, ft_aead_packet *packets, size_t count) noexcept
    void ft_open(ft_aead_key *key, ft_aead_packet *packets, size_t count) noexcept

    const char *ft_aead_backend() noexcept
    const char *ft_aead_backend_at(size_t index) noexcept
    int ft_aead_select(const char *name) noexcept
