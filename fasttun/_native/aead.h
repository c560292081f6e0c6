/* ChaCha20-Poly1305 (RFC 8439) for WireGuard's data packets, many at a time under one key: the nonce is
 * four zero bytes and the counter, there is no associated data (WireGuard paper §5.4.6). For the packet path;
 * the handshake's AEAD is not here.
 *
 * What does the work is a back end. `evp`, libcrypto by its documented interface, always works and is the
 * reference; a faster one is taken when it is there and has passed the same self-test (ft_aead_backend).
 */
#ifndef FASTTUN_AEAD_H
#define FASTTUN_AEAD_H

#include <dlfcn.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__) && __has_include(<intel-ipsec-mb.h>)
#include <intel-ipsec-mb.h>
#if IMB_VERSION_NUM >= 0x10000
#define FT_IPSEC_MB 1
#endif
#endif

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

/* ---- Intel's multi-buffer library (intel-ipsec-mb) ---------------------------------------------- */

#ifdef FT_IPSEC_MB

/* It is built for the header's version and looked for when the program runs, so that it is never required: its
 * structures, which we share, keep their layout under one soname and grow at the end. */
static struct {
    IMB_MGR *(*alloc)(uint64_t flags);
    void (*start)(IMB_MGR *manager, IMB_ARCH *architecture);
    void (*free)(IMB_MGR *manager);
    pthread_key_t manager; /* each thread's, since one may serve one thread only; 200 KB */
} ft_imb;

enum { FT_IMB_JOBS = 64 }; /* below IMB_MAX_JOBS, so that none finishes to make room for the next */

static IMB_MGR *ft_imb_manager(void)
{
    IMB_MGR *manager = pthread_getspecific(ft_imb.manager);
    IMB_ARCH architecture = IMB_ARCH_NONE;

    if (manager != NULL)
        return manager;
    manager = ft_imb.alloc(0);
    if (manager == NULL)
        return NULL;
    ft_imb.start(manager, &architecture);
    /* With narrower vectors libcrypto is as fast. */
    if (architecture < IMB_ARCH_AVX2 || pthread_setspecific(ft_imb.manager, manager) != 0) {
        ft_imb.free(manager);
        return NULL;
    }
    return manager;
}

static int ft_imb_load(void)
{
    char soname[32];
    unsigned (*version)(void);
    void *library;

    snprintf(soname, sizeof soname, "libIPSec_MB.so.%d", IMB_VERSION_NUM >> 16);
    library = dlopen(soname, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return -1;
    version = (unsigned (*)(void))dlsym(library, "imb_get_version");
    ft_imb.alloc = (IMB_MGR *(*)(uint64_t))dlsym(library, "alloc_mb_mgr");
    ft_imb.start = (void (*)(IMB_MGR *, IMB_ARCH *))dlsym(library, "init_mb_mgr_auto");
    ft_imb.free = (void (*)(IMB_MGR *))dlsym(library, "free_mb_mgr");
    if (version != NULL && version() >= IMB_VERSION_NUM && version() >> 16 == IMB_VERSION_NUM >> 16
        && ft_imb.alloc != NULL && ft_imb.start != NULL && ft_imb.free != NULL
        && pthread_key_create(&ft_imb.manager, (void (*)(void *))ft_imb.free) == 0) {
        if (ft_imb_manager() != NULL)
            return 0;
        pthread_key_delete(ft_imb.manager);
    }
    dlclose(library);
    return -1;
}

static int ft_imb_init(ft_aead_key *key, const uint8_t bytes[FT_AEAD_KEY])
{
    memcpy(key->bytes, bytes, FT_AEAD_KEY);
    return 0;
}

/* Sets `ok` as for a sealed packet; who opens compares the tag. */
static void ft_imb_finish(const IMB_JOB *job)
{
    if (job != NULL)
        ((ft_aead_packet *)job->user_data)->ok = job->status == IMB_STATUS_COMPLETED;
}

/* Hands over one packet, of `length` bytes without the tag. `nonce` and `tag`, where the tag of the ciphertext
 * goes, must last until the flush. */
static void ft_imb_submit(IMB_MGR *manager, const ft_aead_key *key, ft_aead_packet *packet, uint32_t length,
                          IMB_CIPHER_DIRECTION direction, const uint8_t *nonce, uint8_t *tag)
{
    IMB_JOB *job = IMB_GET_NEXT_JOB(manager);

    packet->ok = 0;
    job->user_data = packet;
    job->cipher_mode = IMB_CIPHER_CHACHA20_POLY1305;
    job->hash_alg = IMB_AUTH_CHACHA20_POLY1305;
    job->cipher_direction = direction;
    job->chain_order = direction == IMB_DIR_ENCRYPT ? IMB_ORDER_CIPHER_HASH : IMB_ORDER_HASH_CIPHER;
    job->enc_keys = job->dec_keys = key->bytes;
    job->key_len_in_bytes = FT_AEAD_KEY;
    job->iv = nonce;
    job->iv_len_in_bytes = FT_AEAD_NONCE;
    job->src = job->dst = packet->data;
    job->cipher_start_src_offset_in_bytes = job->hash_start_src_offset_in_bytes = 0;
    job->msg_len_to_cipher_in_bytes = job->msg_len_to_hash_in_bytes = length;
    job->u.CHACHA20_POLY1305.aad = NULL;
    job->u.CHACHA20_POLY1305.aad_len_in_bytes = 0;
    job->auth_tag_output = tag;
    job->auth_tag_output_len_in_bytes = FT_AEAD_TAG;
    ft_imb_finish(IMB_SUBMIT_JOB_NOCHECK(manager));
}

static void ft_imb_flush(IMB_MGR *manager)
{
    IMB_JOB *job;

    while ((job = IMB_GET_COMPLETED_JOB(manager)) != NULL || (job = IMB_FLUSH_JOB(manager)) != NULL)
        ft_imb_finish(job);
}

static void ft_imb_seal_some(IMB_MGR *manager, ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    uint8_t nonces[FT_IMB_JOBS][FT_AEAD_NONCE];

    for (size_t i = 0; i < count; i++) {
        ft_aead_nonce(nonces[i], packets[i].counter);
        ft_imb_submit(manager, key, &packets[i], packets[i].length, IMB_DIR_ENCRYPT, nonces[i],
                      packets[i].data + packets[i].length);
    }
    ft_imb_flush(manager);
}

static void ft_imb_open_some(IMB_MGR *manager, ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    uint8_t nonces[FT_IMB_JOBS][FT_AEAD_NONCE];
    uint8_t tags[FT_IMB_JOBS][FT_AEAD_TAG];

    for (size_t i = 0; i < count; i++) {
        packets[i].ok = 0;
        if (packets[i].length < FT_AEAD_TAG)
            continue;
        ft_aead_nonce(nonces[i], packets[i].counter);
        ft_imb_submit(manager, key, &packets[i], packets[i].length - FT_AEAD_TAG, IMB_DIR_DECRYPT, nonces[i], tags[i]);
    }
    ft_imb_flush(manager);
    for (size_t i = 0; i < count; i++) {
        size_t plain = packets[i].length - (size_t)FT_AEAD_TAG;

        if (packets[i].length < FT_AEAD_TAG)
            continue;
        if (!packets[i].ok || CRYPTO_memcmp(tags[i], packets[i].data + plain, FT_AEAD_TAG) != 0) {
            packets[i].ok = 0;
            OPENSSL_cleanse(packets[i].data, plain);
        }
    }
    /* The tag that a forgery should have carried is worth as much as a key for that counter. */
    OPENSSL_cleanse(tags, sizeof tags);
}

static void ft_imb_each(void (*some)(IMB_MGR *, ft_aead_key *, ft_aead_packet *, size_t),
                        ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    IMB_MGR *manager = ft_imb_manager();

    for (size_t i = 0; manager == NULL && i < count; i++)
        packets[i].ok = 0;
    for (size_t i = 0; manager != NULL && i < count; i += FT_IMB_JOBS) {
        size_t some_count = count - i < FT_IMB_JOBS ? count - i : FT_IMB_JOBS;

        some(manager, key, packets + i, some_count);
    }
}

static void ft_imb_seal(ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    ft_imb_each(ft_imb_seal_some, key, packets, count);
}

static void ft_imb_open(ft_aead_key *key, ft_aead_packet *packets, size_t count)
{
    ft_imb_each(ft_imb_open_some, key, packets, count);
}

#endif

/* ---- Back ends, and what the packet path calls ------------------------------------------------- */

/* Best first. The last is the reference. */
static const ft_aead_backend_t ft_aead_backends[] = {
#ifdef FT_IPSEC_MB
    {"ipsec-mb", ft_imb_load, ft_imb_init, NULL, ft_imb_seal, ft_imb_open},
#endif
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

/* Encrypts packets in place and writes each one's tag behind it. `ok` is 0 only when the library failed,
 * for lack of memory: such a packet must not be sent. */
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

/* Whether a back end seals a packet as it should, opens it again and refuses it after a change. */
static int ft_aead_proves(ft_aead_key *key, uint32_t length, const uint8_t tag[FT_AEAD_TAG])
{
    enum { MAXIMUM = 1420 };
    uint8_t plain[MAXIMUM], data[MAXIMUM + FT_AEAD_TAG], forged[MAXIMUM + FT_AEAD_TAG];
    ft_aead_packet packet = {data, length, 0, 0x0706050403020100};
    ft_aead_packet sealed[] = {{forged, length + FT_AEAD_TAG, 1, packet.counter},
                               {data, length + FT_AEAD_TAG, 0, packet.counter}};

    for (uint32_t i = 0; i < length; i++)
        plain[i] = data[i] = (uint8_t)(i % 251);
    ft_seal(key, &packet, 1);
    if (!packet.ok || memcmp(data + length, tag, FT_AEAD_TAG) != 0)
        return 0;
    memcpy(forged, data, length + FT_AEAD_TAG);
    forged[length] ^= 1;
    ft_open(key, sealed, 2);
    return !sealed[0].ok && sealed[1].ok && memcmp(data, plain, length) == 0;
}

/* The tags of the key 80 81 … 9f over packets of three lengths, as an independent implementation has them
 * (libsodium). A tag is over the ciphertext, so it vouches for that too. */
static int ft_aead_self_test(const ft_aead_backend_t *backend)
{
    static const struct {
        uint32_t length;
        uint8_t tag[FT_AEAD_TAG];
    } vectors[] = {
        {0, {0x92, 0x3e, 0x3f, 0x46, 0x57, 0xb5, 0xaf, 0xb4, 0xa8, 0x3f, 0xc9, 0xeb, 0xd7, 0xb0, 0xa0, 0x48}},
        {114, {0xc8, 0x47, 0x46, 0xd9, 0x46, 0x5a, 0x6a, 0x25, 0xc4, 0xe6, 0xc7, 0x52, 0x63, 0x40, 0x92, 0x60}},
        {1420, {0x95, 0xcb, 0x01, 0x02, 0xc7, 0xe9, 0x71, 0x36, 0x76, 0xb2, 0x7b, 0xcb, 0x74, 0xbf, 0x5c, 0x7c}},
    };
    uint8_t bytes[FT_AEAD_KEY];
    ft_aead_key key;
    int good = 1;

    for (int i = 0; i < FT_AEAD_KEY; i++)
        bytes[i] = (uint8_t)(0x80 + i);
    if (ft_aead_init_with(backend, &key, bytes) < 0)
        return 0;
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++)
        good &= ft_aead_proves(&key, vectors[i].length, vectors[i].tag);
    ft_aead_wipe(&key);
    return good;
}

static void ft_aead_choose(void)
{
    for (size_t i = 0; i < FT_AEAD_BACKENDS; i++) {
        ft_aead_usable[i] = ft_aead_backends[i].load() == 0 && ft_aead_self_test(&ft_aead_backends[i]);
        if (ft_aead_usable[i] && ft_aead_chosen == NULL)
            ft_aead_chosen = &ft_aead_backends[i];
    }
}

/* Sets `key` for ft_seal and ft_open: 0, or -1 when there is no memory or libcrypto refuses. What `key` held
 * before is not freed. */
static inline int ft_aead_init(ft_aead_key *key, const uint8_t bytes[FT_AEAD_KEY])
{
    pthread_once(&ft_aead_once, ft_aead_choose);
    return ft_aead_init_with(ft_aead_chosen, key, bytes);
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
