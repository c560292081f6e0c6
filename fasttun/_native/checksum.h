/* The Internet checksum (RFC 1071), plain and fused with a copy, by the widest vectors that the
 * processor has. For the packet path; it knows no protocol but the pseudo-headers.
 *
 * Sums are one's-complement sums of 16-bit words in memory order (the first byte of a word is the one
 * at the lower address, whatever the machine's byte order), so a folded sum is stored as it is and
 * a field is added as it was loaded: no byte swapping anywhere. A sum may be continued (`initial`)
 * as long as every part but the last has an even length. A 64-bit sum never loses a carry.
 *
 * Why one may sum wider words in any order, and in any byte order: RFC 1071 section 2.
 */
#ifndef FASTTUN_CHECKSUM_H
#define FASTTUN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FT_NEON 1
#include <arm_neon.h>
#endif

#if !defined(__BYTE_ORDER__)
#error "fasttun needs a compiler that defines __BYTE_ORDER__ (gcc or clang)"
#endif

#define FT_INLINE static inline __attribute__((always_inline, unused))
#define FT_OUTLINE static __attribute__((noinline, unused))

/* ---- Loads and stores, of any alignment ------------------------------------------------------ */

FT_INLINE uint16_t ft_load16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
FT_INLINE uint32_t ft_load32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
FT_INLINE uint64_t ft_load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }
FT_INLINE void ft_store16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
FT_INLINE void ft_store32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }
FT_INLINE void ft_store64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
FT_INLINE uint16_t ft_be16(uint16_t v) { return __builtin_bswap16(v); }
FT_INLINE uint32_t ft_be32(uint32_t v) { return __builtin_bswap32(v); }
#else
FT_INLINE uint16_t ft_be16(uint16_t v) { return v; }
FT_INLINE uint32_t ft_be32(uint32_t v) { return v; }
#endif
FT_INLINE uint16_t ft_load_be16(const uint8_t *p) { return ft_be16(ft_load16(p)); }
FT_INLINE uint32_t ft_load_be32(const uint8_t *p) { return ft_be32(ft_load32(p)); }
FT_INLINE void ft_store_be16(uint8_t *p, uint16_t v) { ft_store16(p, ft_be16(v)); }
FT_INLINE void ft_store_be32(uint8_t *p, uint32_t v) { ft_store32(p, ft_be32(v)); }

/* ---- Arithmetic ------------------------------------------------------------------------------ */

/* One's-complement addition: the carry out of bit 63 comes back in at bit 0. */
FT_INLINE uint64_t ft_add(uint64_t a, uint64_t b)
{
    a += b;
    return a + (a < b);
}

/* The two halves of a word, added: at most 33 bits, congruent to the word. */
FT_INLINE uint64_t ft_halves(uint64_t w) { return (w & 0xffffffffu) + (w >> 32); }

/* Folds a sum to 16 bits, not inverted. 0 only for a sum of 0; any other multiple of 65535 gives 0xffff. */
FT_INLINE uint16_t ft_fold(uint64_t sum)
{
    sum = (sum >> 32) + (sum & 0xffffffffu);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    return (uint16_t)sum;
}

/* The 1 to 7 bytes at `p` as the first bytes of a word in memory, zeroes behind; copied to `to` unless NULL.
 * By overlapping loads: bytes collected in memory and loaded as a word would stall the load. */
FT_INLINE uint64_t ft_partial(uint8_t *restrict to, const uint8_t *restrict p, size_t n)
{
    uint64_t first, last;
    size_t first_bytes, last_bytes;
    if (n >= 4) {
        first = ft_load32(p);
        last = ft_load32(p + n - 4);
        first_bytes = last_bytes = 4;
        if (to) {
            ft_store32(to, (uint32_t)first);
            ft_store32(to + n - 4, (uint32_t)last);
        }
    } else {
        last = p[n - 1];
        last_bytes = 1;
        first_bytes = n >= 2 ? 2 : 1;
        first = n >= 2 ? ft_load16(p) : last;
        if (to) {
            if (n >= 2)
                ft_store16(to, (uint16_t)first);
            to[n - 1] = (uint8_t)last;
        }
    }
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    (void)first_bytes;
    return first | last << 8 * (n - last_bytes);
#else
    (void)last_bytes;
    return first << 8 * (8 - first_bytes) | last << 8 * (8 - n);
#endif
}

/* The scalar loops: headers, tails, and processors without a variant of their own. */
FT_INLINE uint64_t ft_sum_words(const uint8_t *p, size_t n, uint64_t initial)
{
    uint64_t low = 0, high = 0;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w = ft_load64(p);
        low += w & 0xffffffffu;
        high += w >> 32;
    }
    if (n)
        low += ft_halves(ft_partial(NULL, p, n));
    return ft_add(low + high, initial);
}

FT_INLINE uint64_t ft_copy_words(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    uint64_t low = 0, high = 0;
    for (; n >= 8; p += 8, to += 8, n -= 8) {
        uint64_t w = ft_load64(p);
        ft_store64(to, w);
        low += w & 0xffffffffu;
        high += w >> 32;
    }
    if (n)
        low += ft_halves(ft_partial(to, p, n));
    return ft_add(low + high, initial);
}

FT_OUTLINE uint64_t ft_sum_scalar(const uint8_t *p, size_t n, uint64_t initial)
{
    return ft_sum_words(p, n, initial);
}

FT_OUTLINE uint64_t ft_copy_scalar(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    return ft_copy_words(to, p, n, initial);
}

/* ---- Vector variants -------------------------------------------------------------------------
 *
 * x86: the unsigned words, less 0x8000 each, are signed words, which multiply-and-add (by ones) adds in
 * pairs to 32-bit lanes; 0x8000 for each word is added back at the end. A lane takes at most 65536 a
 * step, so FT_BLOCK keeps it below 2**30.
 */
#define FT_BLOCK ((size_t)1 << 17)

#if defined(__x86_64__)

FT_INLINE uint64_t ft_lanes_sse2(__m128i lanes, size_t bytes)
{
    int32_t lane[4];
    memcpy(lane, &lanes, 16);
    int64_t sum = (int64_t)lane[0] + lane[1] + lane[2] + lane[3] + (int64_t)bytes * 0x4000;
    return (uint64_t)sum;
}

#define FT_STEP_SSE2(acc, at)                                                     \
    do {                                                                          \
        __m128i v = _mm_loadu_si128((const __m128i *)(p + (at)));                 \
        if (to)                                                                   \
            _mm_storeu_si128((__m128i *)(to + (at)), v);                          \
        acc = _mm_add_epi32(acc, _mm_madd_epi16(_mm_xor_si128(v, bias), ones));   \
    } while (0)

FT_INLINE uint64_t ft_run_sse2(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    const __m128i ones = _mm_set1_epi16(1), bias = _mm_set1_epi16((short)0x8000);
    while (n >= 16) {
        __m128i a = _mm_setzero_si128(), b = a, c = a, d = a;
        size_t take = (n < FT_BLOCK ? n : FT_BLOCK) & ~(size_t)15, left = take;
        for (; left >= 64; left -= 64, p += 64, to = to ? to + 64 : to) {
            FT_STEP_SSE2(a, 0); FT_STEP_SSE2(b, 16); FT_STEP_SSE2(c, 32); FT_STEP_SSE2(d, 48);
        }
        for (; left; left -= 16, p += 16, to = to ? to + 16 : to)
            FT_STEP_SSE2(a, 0);
        a = _mm_add_epi32(_mm_add_epi32(a, b), _mm_add_epi32(c, d));
        initial = ft_add(initial, ft_lanes_sse2(a, take));
        n -= take;
    }
    return to ? ft_copy_words(to, p, n, initial) : ft_sum_words(p, n, initial);
}

FT_OUTLINE uint64_t ft_sum_sse2(const uint8_t *p, size_t n, uint64_t initial)
{
    return ft_run_sse2(NULL, p, n, initial);
}

FT_OUTLINE uint64_t ft_copy_sse2(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    return ft_run_sse2(to, p, n, initial);
}

#define FT_AVX2 __attribute__((target("avx2")))
#define FT_STEP_AVX2(acc, at)                                                             \
    do {                                                                                  \
        __m256i v = _mm256_loadu_si256((const __m256i *)(p + (at)));                      \
        if (to)                                                                           \
            _mm256_storeu_si256((__m256i *)(to + (at)), v);                               \
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_xor_si256(v, bias), ones));  \
    } while (0)

FT_INLINE FT_AVX2 uint64_t ft_run_avx2(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    const __m256i ones = _mm256_set1_epi16(1), bias = _mm256_set1_epi16((short)0x8000);
    while (n >= 32) {
        __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
        size_t take = (n < FT_BLOCK ? n : FT_BLOCK) & ~(size_t)31, left = take;
        for (; left >= 128; left -= 128, p += 128, to = to ? to + 128 : to) {
            FT_STEP_AVX2(a, 0); FT_STEP_AVX2(b, 32); FT_STEP_AVX2(c, 64); FT_STEP_AVX2(d, 96);
        }
        for (; left; left -= 32, p += 32, to = to ? to + 32 : to)
            FT_STEP_AVX2(a, 0);
        a = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        initial = ft_add(initial, ft_lanes_sse2(half, take));
        n -= take;
    }
    return to ? ft_copy_words(to, p, n, initial) : ft_sum_words(p, n, initial);
}

FT_OUTLINE FT_AVX2 uint64_t ft_sum_avx2(const uint8_t *p, size_t n, uint64_t initial)
{
    return ft_run_avx2(NULL, p, n, initial);
}

FT_OUTLINE FT_AVX2 uint64_t ft_copy_avx2(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    return ft_run_avx2(to, p, n, initial);
}

#define FT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))
#define FT_SUM_AVX512(acc, v) \
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_xor_si512(v, bias), ones))
#define FT_STEP_AVX512(acc, at)                                     \
    do {                                                            \
        __m512i v = _mm512_loadu_si512((const void *)(p + (at)));   \
        if (to)                                                     \
            _mm512_storeu_si512((void *)(to + (at)), v);            \
        FT_SUM_AVX512(acc, v);                                      \
    } while (0)

FT_INLINE FT_AVX512 uint64_t ft_run_avx512(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    const __m512i ones = _mm512_set1_epi16(1), bias = _mm512_set1_epi16((short)0x8000);
    while (n) {
        __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
        size_t take = n < FT_BLOCK ? n : FT_BLOCK, left = take, summed = take & ~(size_t)63;
        for (; left >= 256; left -= 256, p += 256, to = to ? to + 256 : to) {
            FT_STEP_AVX512(a, 0); FT_STEP_AVX512(b, 64); FT_STEP_AVX512(c, 128); FT_STEP_AVX512(d, 192);
        }
        for (; left >= 64; left -= 64, p += 64, to = to ? to + 64 : to)
            FT_STEP_AVX512(a, 0);
        if (left) {  /* the bytes that the mask leaves out read as zero, which is the padding of RFC 1071 */
            __mmask64 mask = ~(__mmask64)0 >> (64 - left);
            __m512i v = _mm512_maskz_loadu_epi8(mask, (const void *)p);
            if (to)
                _mm512_mask_storeu_epi8((void *)to, mask, v);
            FT_SUM_AVX512(b, v);
            summed += 64;
        }
        a = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
        __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
        __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        initial = ft_add(initial, ft_lanes_sse2(quarter, summed));
        n -= take;
    }
    return initial;
}

FT_OUTLINE FT_AVX512 uint64_t ft_sum_avx512(const uint8_t *p, size_t n, uint64_t initial)
{
    return ft_run_avx512(NULL, p, n, initial);
}

FT_OUTLINE FT_AVX512 uint64_t ft_copy_avx512(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    return ft_run_avx512(to, p, n, initial);
}

#elif defined(FT_NEON)

/* A lane takes at most 2 * 65535 a step and 2**13 steps a block: below 2**31. */
#define FT_STEP_NEON(acc, at)                                   \
    do {                                                        \
        uint8x16_t v = vld1q_u8(p + (at));                      \
        if (to)                                                 \
            vst1q_u8(to + (at), v);                             \
        acc = vpadalq_u16(acc, vreinterpretq_u16_u8(v));        \
    } while (0)

FT_INLINE uint64_t ft_run_neon(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    while (n >= 16) {
        uint32x4_t a = vdupq_n_u32(0), b = a, c = a, d = a;
        size_t left = (n < FT_BLOCK ? n : FT_BLOCK) & ~(size_t)15;
        n -= left;
        for (; left >= 64; left -= 64, p += 64, to = to ? to + 64 : to) {
            FT_STEP_NEON(a, 0); FT_STEP_NEON(b, 16); FT_STEP_NEON(c, 32); FT_STEP_NEON(d, 48);
        }
        for (; left; left -= 16, p += 16, to = to ? to + 16 : to)
            FT_STEP_NEON(a, 0);
        initial = ft_add(initial, vaddlvq_u32(a) + vaddlvq_u32(b) + vaddlvq_u32(c) + vaddlvq_u32(d));
    }
    return to ? ft_copy_words(to, p, n, initial) : ft_sum_words(p, n, initial);
}

FT_OUTLINE uint64_t ft_sum_neon(const uint8_t *p, size_t n, uint64_t initial)
{
    return ft_run_neon(NULL, p, n, initial);
}

FT_OUTLINE uint64_t ft_copy_neon(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    return ft_run_neon(to, p, n, initial);
}

#endif

/* ---- Choice ----------------------------------------------------------------------------------
 *
 * Function pointers that a constructor sets when the extension is loaded: no ifunc, which musl lacks.
 * Each extension that includes this file has its own.
 */
typedef struct {
    const char *name;
    uint64_t (*sum)(const uint8_t *p, size_t n, uint64_t initial);
    uint64_t (*copy)(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial);
} ft_checksum_variant_t;

/* Best first. AVX-512 only where VBMI says that the processor is of a generation (Ice Lake, Zen 4) which
 * does not lower its clock for 512-bit multiplications. */
static const ft_checksum_variant_t ft_checksum_variants[] = {
#if defined(__x86_64__)
    {"avx512", ft_sum_avx512, ft_copy_avx512},
    {"avx2", ft_sum_avx2, ft_copy_avx2},
    {"sse2", ft_sum_sse2, ft_copy_sse2},
#elif defined(FT_NEON)
    {"neon", ft_sum_neon, ft_copy_neon},
#endif
    {"scalar", ft_sum_scalar, ft_copy_scalar},
};
#define FT_CHECKSUM_VARIANTS (sizeof ft_checksum_variants / sizeof *ft_checksum_variants)

static ft_checksum_variant_t ft_checksum_chosen = {"scalar", ft_sum_scalar, ft_copy_scalar};

#if defined(__x86_64__)
/* By CPUID and XGETBV themselves: __builtin_cpu_supports needs a run-time library that not every clang has.
 * Bits: Intel SDM volume 2A, CPUID; volume 1, 13.3 (XCR0: what the kernel saves at a task switch). */
FT_OUTLINE int ft_processor_level(void)
{
    unsigned a, b, c, d, xcr0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if ((xcr0 & 0xe6) == 0xe6 && b & 1u << 16 && b & 1u << 30 && b & 1u << 31 && c & 1u << 1)
        return 2;
    return (xcr0 & 0x06) == 0x06 && b & 1u << 5;
}

/* 2: AVX-512 F, BW, VL and VBMI; 1: AVX2; 0: neither. Asked once: CPUID takes microseconds in a virtual machine. */
FT_OUTLINE int ft_processor(void)
{
    static int level = -1;
    if (level < 0)
        level = ft_processor_level();
    return level;
}
#endif

FT_OUTLINE int ft_checksum_supported(const char *name)
{
#if defined(__x86_64__)
    if (!strcmp(name, "avx512"))
        return ft_processor() >= 2;
    if (!strcmp(name, "avx2"))
        return ft_processor() >= 1;
#endif
    for (size_t i = 0; i < FT_CHECKSUM_VARIANTS; i++)
        if (!strcmp(name, ft_checksum_variants[i].name))
            return 1;
    return 0;
}

/* Name of the i-th variant that this processor supports, best first; NULL past the last. */
FT_OUTLINE const char *ft_checksum_variant_at(size_t index)
{
    for (size_t i = 0; i < FT_CHECKSUM_VARIANTS; i++)
        if (ft_checksum_supported(ft_checksum_variants[i].name) && index-- == 0)
            return ft_checksum_variants[i].name;
    return NULL;
}

/* Makes one variant, or with NULL the best, the one in use: 0, or -1 when the processor lacks it.
 * For tests: not while another thread sums. */
FT_OUTLINE int ft_checksum_force(const char *name)
{
    for (size_t i = 0; i < FT_CHECKSUM_VARIANTS; i++) {
        if ((name == NULL || !strcmp(name, ft_checksum_variants[i].name))
            && ft_checksum_supported(ft_checksum_variants[i].name)) {
            ft_checksum_chosen = ft_checksum_variants[i];
            return 0;
        }
    }
    return -1;
}

static void __attribute__((constructor, unused)) ft_checksum_choose(void) { ft_checksum_force(NULL); }

/* Name of the variant in use. */
FT_INLINE const char *ft_checksum_variant(void) { return ft_checksum_chosen.name; }

/* ---- What the packet path calls -------------------------------------------------------------- */

/* Below this length a call through the pointer costs more than it gains. */
#define FT_VECTOR_MINIMUM 96

/* Adds the `n` bytes at `p` to `initial`; an odd last byte is padded with a zero byte behind it. */
FT_INLINE uint64_t ft_sum(const uint8_t *p, size_t n, uint64_t initial)
{
    return n < FT_VECTOR_MINIMUM ? ft_sum_words(p, n, initial) : ft_checksum_chosen.sum(p, n, initial);
}

/* The same while copying to `to`, which must not overlap. */
FT_INLINE uint64_t ft_copy_sum(uint8_t *restrict to, const uint8_t *restrict p, size_t n, uint64_t initial)
{
    return n < FT_VECTOR_MINIMUM ? ft_copy_words(to, p, n, initial) : ft_checksum_chosen.copy(to, p, n, initial);
}

/* Sum without the `n` bytes of a field: adding the complement is subtraction. */
FT_INLINE uint64_t ft_without16(uint64_t sum, const uint8_t *p) { return ft_add(sum, (uint16_t)~ft_load16(p)); }

/* Pseudo-header sums, RFC 9293 section 3.1 and RFC 8200 section 8.1. `addresses`: source, then destination
 * (8 or 32 bytes); `length`: of the transport header and payload, 0 to add it later. */
FT_INLINE uint64_t ft_pseudo_v4(const uint8_t *addresses, uint8_t protocol, uint16_t length)
{
    return ft_halves(ft_load64(addresses)) + ft_be16(protocol) + ft_be16(length);
}

FT_INLINE uint64_t ft_pseudo_v6(const uint8_t *addresses, uint8_t protocol, uint16_t length)
{
    return ft_halves(ft_load64(addresses)) + ft_halves(ft_load64(addresses + 8))
        + ft_halves(ft_load64(addresses + 16)) + ft_halves(ft_load64(addresses + 24))
        + ft_be16(protocol) + ft_be16(length);
}

#endif
