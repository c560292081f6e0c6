/* mac1 of WireGuard's handshake messages: keyed BLAKE2s with 16 bytes of output (paper §5.4.4), by libcrypto. */

#ifndef FASTTUN_MAC1_H
#define FASTTUN_MAC1_H

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <stdint.h>

enum { FT_MAC1_SIZE = 16, FT_MAC1_KEY_SIZE = 32 };

/* A context that holds the key, or NULL when libcrypto refuses. One thread at a time. */
static inline EVP_MAC_CTX *ft_mac1_new(const uint8_t key[FT_MAC1_KEY_SIZE])
{
    size_t size = FT_MAC1_SIZE;
    OSSL_PARAM params[] = {OSSL_PARAM_construct_size_t(OSSL_MAC_PARAM_SIZE, &size), OSSL_PARAM_construct_end()};
    EVP_MAC *mac = EVP_MAC_fetch(NULL, "BLAKE2SMAC", NULL);
    EVP_MAC_CTX *context = mac != NULL ? EVP_MAC_CTX_new(mac) : NULL;

    EVP_MAC_free(mac);
    if (context != NULL && EVP_MAC_init(context, key, FT_MAC1_KEY_SIZE, params) != 1) {
        EVP_MAC_CTX_free(context);
        return NULL;
    }
    return context;
}

static inline void ft_mac1_free(EVP_MAC_CTX *context)
{
    EVP_MAC_CTX_free(context);
}

/* Whether `message` of `length` bytes ends with mac1 and mac2, 16 bytes each, and mac1 is right. */
static inline int ft_mac1_check(EVP_MAC_CTX *context, const uint8_t *message, size_t length)
{
    uint8_t mac[FT_MAC1_SIZE];
    size_t size = 0;
    size_t covered = length - 2 * FT_MAC1_SIZE;

    if (context == NULL || length <= 2 * FT_MAC1_SIZE)
        return 0;
    /* Without a key it starts again with the one that it has. */
    if (EVP_MAC_init(context, NULL, 0, NULL) != 1 || EVP_MAC_update(context, message, covered) != 1 ||
        EVP_MAC_final(context, mac, &size, sizeof mac) != 1 || size != sizeof mac)
        return 0;
    return CRYPTO_memcmp(mac, message + covered, sizeof mac) == 0;
}

#endif
