"""The Internet checksum, plain and fused with a copy: the faces of checksum.h, which says how it works.

Sums are in memory order: fields are added as loaded (`ft_load16`), results stored as folded (`ft_store16`).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "checksum.h" nogil:
    uint16_t ft_load16(const uint8_t *p)
    uint32_t ft_load32(const uint8_t *p)
    uint64_t ft_load64(const uint8_t *p)
    void ft_store16(uint8_t *p, uint16_t v)
    void ft_store32(uint8_t *p, uint32_t v)
    void ft_store64(uint8_t *p, uint64_t v)
    uint16_t ft_be16(uint16_t v)
    uint32_t ft_be32(uint32_t v)
    uint16_t ft_load_be16(const uint8_t *p)
    uint32_t ft_load_be32(const uint8_t *p)
    void ft_store_be16(uint8_t *p, uint16_t v)
    void ft_store_be32(uint8_t *p, uint32_t v)

    uint64_t ft_sum(const uint8_t *p, size_t n, uint64_t initial)
    uint64_t ft_copy_sum(uint8_t *to, const uint8_t *p, size_t n, uint64_t initial)
    uint16_t ft_fold(uint64_t sum)
    uint64_t ft_add(uint64_t a, uint64_t b)
    uint64_t ft_halves(uint64_t word)
    uint64_t ft_without16(uint64_t sum, const uint8_t *p)
    uint64_t ft_pseudo_v4(const uint8_t *addresses, uint8_t protocol, uint16_t length)
    uint64_t ft_pseudo_v6(const uint8_t *addresses, uint8_t protocol, uint16_t length)

    const char *ft_checksum_variant()
    const char *ft_checksum_variant_at(size_t index)
    int ft_checksum_force(const char *name)
