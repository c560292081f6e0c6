/* ChaCha20-Poly1305 (RFC 8439) for WireGuard's data packets, many at a time under one key: the nonce is
 * four zero bytes and the counter, there is no associated data (WireGuard paper §5.4.6). For the packet path;
 * the handshake's AEAD is not here.
 *
 * What does the work is a back end. `evp`, libcrypto by its documented interface, always works and is the
 * reference; a faster one is taken when it is there and has passed the same self-test (ft_aead_backend).
 */
#ifndef FASTTUN_AEAD_H
#define FASTTUN_AEAD_H

#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FT_AEAD_KEY = 32, FT_AEAD_NONCE = 12, FT_AEAD_TAG = 16 };

struct ft_aead_backend_t;

/* One key. Zeroed memory is a key that was never set: ft_aead_wipe takes it, nothing else does.
 * One thread at a time uses it. */
typedef struct ft_aead_key {
    const struct ft_aead_backend_t *backend;
    void *context; /* the back end's own, or NULL */
    uint8_t bytes[FT_AEAD_KEY]; /* for back ends without a context; else zeroes */
} ft_aead_key;

/* data: the packet, worked on in place, of any alignment; with room for FT_AEAD_TAG bytes behind when sealing
 * length: of the plaintext when sealing; with the tag when opening */
typedef struct {
    uint8_t *data;
    uint32_t length;
    uint32_t ok;
    uint64_t counter;
} ft_aead_packet;

typedef struct ft_aead_backend_t {
    const char *name;
    int (*load)(void); /* 0, or -1 when this machine lacks it; called once, by one thread */
    int (*init)(ft_aead_key *key, const uint8_t bytes[FT_AEAD_KEY]); /* 0 or -1; `key` is zeroed */
    void (*wipe)(ft_aead_key *key); /* frees `context`; NULL when there is none */
    void (*seal)(ft_aead_key *key, ft_aead_packet *packets, size_t count);
    void (*open)(ft_aead_key *key, ft_aead_packet *packets, size_t count);
} ft_aead_backend_t;

static inline void ft_aead_nonce(uint8_t nonce[FT_AEAD_NONCE], uint64_t counter)
{
    memset(nonce, 0, 4);
    for (int i = 0; i < 8; i++)
        nonce[4 + i] = (uint8_t)(counter >> 8 * i);
}

/* ---- libcrypto's EVP --------------------------------------------------------------------------- */

static EVP_CIPHER *ft_evp_cipher;

static int ft_evp_load(void)
{
    ft_evp_cipher = EVP_CIPHER_fetch(NULL, "ChaCha20-Poly1305", NULL);
    return ft_evp_cipher != NULL ? 0 : -1;
}

static int ft_evp_init(ft_aead_key *key, const uint8_t bytes[FT_AEAD_KEY])
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();

    if (context == NULL || EVP_EncryptInit_ex2(context, ft_evp_cipher, bytes, NULL, NULL) != 1) {
        EVP_CIPHER_CTX_free(context);
        return -1;
    }
    key->context = context;
    return 0;
}

static void ft_evp_wipe(ft_aead_key *key)
{
    EVP_CIPHER_CTX_free(key->context); /* cleanses what it frees */
}

static int ft_evp_seal_one(EVP_CIPHER_CTX *context, ft_aead_packet *packet)
{
    uint8_t nonce[FT_AEAD_NONCE];
    int length;

    ft_aead_nonce(nonce, packet->counter);
    if (packet->length > INT_MAX - FT_AEAD_TAG || EVP_EncryptInit_ex2(context, NULL, NULL, nonce, NULL) != 1)
        return 0;
    /* A length of 0 would count as the end. */
    if (packet->length && EVP_EncryptUpdate(context, packet->data, &length, packet->data, (int)packet->length) != 1)
        return 0;
    return EVP_EncryptFinal_ex(context, packet->data + packet->length, &length) == 1
        && EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, FT_AEAD_TAG, packet->data + packet->length) == 1;
}

static int ft_evp_open_one(EVP_CIPHER_CTX *context, ft_aead_packet *packet)
{
    uint8_t nonce[FT_AEAD_NONCE];
    int length, plain;

    if (packet->length < FT_AEAD_TAG || packet->length > INT_MAX)
        return 0;
    plain = (int)packet->length - FT_AEAD_TAG;
    ft_aead_nonce(nonce, packet->counter);
    if (EVP_DecryptInit_ex2(context, NULL, NULL, nonce, NULL) == 1
        && EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, FT_AEAD_TAG, packet->data + plain) == 1
        && (plain == 0 || EVP_DecryptUpdate(context, packet->data, &length, packet->data, plain) == 1)
        && EVP_DecryptFinal_ex(context, packet->data + plain, &length) == 1)
        return 1;
    /* It decrypts before it knows: a forgery's text is to reach nobody. */
    OPENSSL_cleanse(packet->data, (size_t)plain);
    return 0;
}

static void ft_evp_seal(ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    for (size_t i = 0; i < count; i++)
        packets[i].ok = (uint32_t)ft_evp_seal_one(key->context, &packets[i]);
}

static void ft_evp_open(ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    for (size_t i = 0; i < count; i++)
        packets[i].ok = (uint32_t)ft_evp_open_one(key->context, &packets[i]);
}

/* ---- The choice -------------------------------------------------------------------------------- */

/* Best first. The last is the reference. */
static const ft_aead_backend_t ft_aead_backends[] = {
    {"evp", ft_evp_load, ft_evp_init, ft_evp_wipe, ft_evp_seal, ft_evp_open},
};
enum { FT_AEAD_BACKENDS = sizeof ft_aead_backends / sizeof ft_aead_backends[0] };

static uint8_t ft_aead_usable[FT_AEAD_BACKENDS];
static const ft_aead_backend_t *ft_aead_chosen; /* NULL when not even libcrypto has the cipher */
static pthread_once_t ft_aead_once = PTHREAD_ONCE_INIT;

static int ft_aead_init_with(const ft_aead_backend_t *backend, ft_aead_key *key, const uint8_t bytes[FT_AEAD_KEY])
{
    memset(key, 0, sizeof *key);
    if (backend == NULL || backend->init(key, bytes) < 0)
        return -1;
    key->backend = backend;
    return 0;
}

/* Overwrites the key and frees what belongs to it. Also for a zeroed key, and again. */
static inline void ft_aead_wipe(ft_aead_key *key)
{
    if (key->backend != NULL && key->backend->wipe != NULL)
        key->backend->wipe(key);
    OPENSSL_cleanse(key, sizeof *key);
}

static void ft_aead_choose(void)
{
    for (size_t i = 0; i < FT_AEAD_BACKENDS; i++) {
        ft_aead_usable[i] = ft_aead_backends[i].load() == 0;
        if (ft_aead_usable[i] && ft_aead_chosen == NULL)
            ft_aead_chosen = &ft_aead_backends[i];
    }
}

/* ---- What the packet path calls ---------------------------------------------------------------- */

/* Sets `key` for ft_seal and ft_open: 0, or -1 when there is no memory or libcrypto refuses. What `key` held
 * before is not freed. */
static inline int ft_aead_init(ft_aead_key *key, const uint8_t bytes[FT_AEAD_KEY])
{
    pthread_once(&ft_aead_once, ft_aead_choose);
    return ft_aead_init_with(ft_aead_chosen, key, bytes);
}

/* Encrypts packets in place and writes each one's tag behind it. `ok` is 0 only when libcrypto failed: such a
 * packet must not be sent. */
static inline void ft_seal(ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    key->backend->seal(key, packets, count);
}

/* Decrypts packets in place. `ok` is 1 for an authentic one, whose plaintext is `length` - FT_AEAD_TAG bytes;
 * the data of any other is undefined, but never what it would decrypt to. */
static inline void ft_open(ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    key->backend->open(key, packets, count);
}

/* Name of the back end of keys set from now on; NULL when there is none at all. */
static inline const char *ft_aead_backend(void)
{
    pthread_once(&ft_aead_once, ft_aead_choose);
    return ft_aead_chosen != NULL ? ft_aead_chosen->name : NULL;
}

/* Name of the `index`-th back end usable here, best first; NULL past the last. */
static inline const char *ft_aead_backend_at(size_t index)
{
    pthread_once(&ft_aead_once, ft_aead_choose);
    for (size_t i = 0; i < FT_AEAD_BACKENDS; i++)
        if (ft_aead_usable[i] && index-- == 0)
            return ft_aead_backends[i].name;
    return NULL;
}

/* Chooses the back end of keys set from now on, the best with NULL: 0, or -1 when it is absent.
 * For tests: not while another thread sets a key. */
static inline int ft_aead_select(const char *name)
{
    pthread_once(&ft_aead_once, ft_aead_choose);
    for (size_t i = 0; i < FT_AEAD_BACKENDS; i++) {
        if (ft_aead_usable[i] && (name == NULL || !strcmp(name, ft_aead_backends[i].name))) {
            ft_aead_chosen = &ft_aead_backends[i];
            return 0;
        }
    }
    return -1;
}

#endif
