# Whether a handshake message was made by someone who knows our public key; see mac1.h.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

cdef extern from "_native/mac1.h" nogil:
    ctypedef struct EVP_MAC_CTX:
        pass

    EVP_MAC_CTX *ft_mac1_new(const uint8_t *key) noexcept
    void ft_mac1_free(EVP_MAC_CTX *) noexcept
    bint ft_mac1_check(EVP_MAC_CTX *, const uint8_t *message, size_t length) noexcept
