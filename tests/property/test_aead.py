"""ChaCha20-Poly1305 in each back end: published vectors, libsodium as the oracle, forgeries, memory, the choice."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cryptography_vectors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings

from fasttun import _testing
from fasttun._testing import AEAD_TAG, AeadKey

BACKENDS = _testing.aead_backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS)
KEY = bytes(range(32))
LONGEST = 65535 - AEAD_TAG
MARGIN = bytes(range(1, 65))

counters = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1), st.sampled_from([2**32 - 1, 2**32, 2**64 - 1]))
keys = st.binary(min_size=32, max_size=32)


def nonce_of(counter: int) -> bytes:
    return bytes(4) + counter.to_bytes(8, "little")


def sealed_by_libsodium(key: bytes, counter: int, plain: bytes) -> bytes:
    return bindings.crypto_aead_chacha20poly1305_ietf_encrypt(plain, None, nonce_of(counter), key)


def random_bytes(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


packets_of_any_length = st.lists(
    st.tuples(counters, st.builds(random_bytes, st.integers(0, 2048), st.integers(0, 1 << 20))), max_size=70
)


# ---- Published vectors ----------------------------------------------------------------------------


def published() -> list[dict[str, bytes]]:
    """The vectors of OpenSSL and BoringSSL, among them RFC 8439's §2.8.2 and A.5."""
    names = {"IV": "nonce", "NONCE": "nonce", "IN": "plain", "PLAINTEXT": "plain", "AD": "aad", "AAD": "aad"}
    names |= {"CT": "sealed", "CIPHERTEXT": "sealed", "TAG": "tag", "KEY": "key", "RESULT": "fault"}
    vectors: list[dict[str, bytes]] = []
    folder = Path(cryptography_vectors.__file__).parent / "ciphers" / "ChaCha20Poly1305"
    for line in "\n".join(path.read_text() for path in sorted(folder.glob("*.txt"))).splitlines():
        field = re.match(r"(\w+) ?= ?(.*)", line)
        if field and field[1] == "COUNT":
            vectors.append({})
        elif field and field[1].upper() in names:
            name, value = names[field[1].upper()], field[2]
            is_text = value.startswith('"') or name == "fault"
            vectors[-1][name] = value.strip('"').encode() if is_text else bytes.fromhex(value)
    return vectors


def how_far(vector: dict[str, bytes]) -> str:
    """How much of a vector our form of the AEAD, without associated data and with a 64-bit counter, can repeat."""
    if vector["nonce"][:4] != bytes(4):
        return "nothing: its nonce does not begin with zeroes"
    if vector["aad"]:
        return "the ciphertext: associated data changes only the tag"
    return "all"


def test_the_published_vectors_are_all_looked_at() -> None:
    assert Counter(how_far(vector).split(":")[0] for vector in published()) == {
        "all": 1, "the ciphertext": 64, "nothing": 6,
    }  # fmt: skip


def test_the_oracle_repeats_every_published_vector() -> None:
    for vector in published():
        plain, aad, nonce, key = (vector[name] for name in ("plain", "aad", "nonce", "key"))
        sealed = bindings.crypto_aead_chacha20poly1305_ietf_encrypt(plain, aad, nonce, key)
        assert (sealed == vector["sealed"] + vector["tag"]) == ("fault" not in vector)


@each_backend
def test_published_vectors(backend: str) -> None:
    for vector in published():
        reach = how_far(vector)
        if reach.startswith("nothing"):
            continue
        counter = int.from_bytes(vector["nonce"][4:], "little")
        ((ok, sealed),) = AeadKey(vector["key"], backend).seal([(counter, vector["plain"])])
        assert ok == 1
        assert sealed[:-AEAD_TAG] == vector["sealed"]
        if reach == "all":
            assert sealed[-AEAD_TAG:] == vector["tag"]


@each_backend
def test_rfc_8439_section_2_4_2(backend: str) -> None:
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    counter = int.from_bytes(bytes.fromhex("0000004a00000000"), "little")
    ((_, sealed),) = AeadKey(KEY, backend).seal([(counter, plain)])
    assert sealed[:-AEAD_TAG].hex() == (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
        "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


# ---- Against libsodium ----------------------------------------------------------------------------


@each_backend
def test_every_length_up_to_2048(backend: str) -> None:
    key = AeadKey(KEY, backend)
    data = random_bytes(2048, 1)
    packets = [(length, data[:length]) for length in range(2049)]
    sealed = key.seal(packets)
    assert sealed == [(1, sealed_by_libsodium(KEY, *packet)) for packet in packets]
    opened = key.open([(length, memory) for length, (_, memory) in enumerate(sealed)])
    assert [(ok, memory[:-AEAD_TAG]) for ok, memory in opened] == [(1, plain) for _, plain in packets]


@each_backend
@settings(max_examples=100, deadline=None)
@given(key=keys, packets=packets_of_any_length)
def test_seals_as_libsodium_does(backend: str, key: bytes, packets: list[tuple[int, bytes]]) -> None:
    assert AeadKey(key, backend).seal(packets) == [(1, sealed_by_libsodium(key, *packet)) for packet in packets]


@each_backend
@settings(max_examples=100, deadline=None)
@given(key=keys, packets=packets_of_any_length)
def test_opens_what_libsodium_sealed(backend: str, key: bytes, packets: list[tuple[int, bytes]]) -> None:
    opened = AeadKey(key, backend).open([(counter, sealed_by_libsodium(key, counter, p)) for counter, p in packets])
    assert [(ok, memory[:-AEAD_TAG]) for ok, memory in opened] == [(1, plain) for _, plain in packets]


@each_backend
@pytest.mark.parametrize("length", [4095, 4096, 65000, LONGEST - 1, LONGEST])
def test_long_packets(backend: str, length: int) -> None:
    key = AeadKey(KEY, backend)
    plain = random_bytes(length, length)
    ((ok, sealed),) = key.seal([(7, plain)])
    assert (ok, sealed) == (1, sealed_by_libsodium(KEY, 7, plain))
    ((ok, opened),) = key.open([(7, sealed)])
    assert (ok, opened[:-AEAD_TAG]) == (1, plain)


@each_backend
def test_all_64_bits_of_the_counter_are_in_the_nonce(backend: str) -> None:
    key = AeadKey(KEY, backend)
    sealed = [memory for _, memory in key.seal([(0, b"packet"), *((1 << bit, b"packet") for bit in range(64))])]
    assert len(set(sealed)) == 65
    assert sealed[33] == sealed_by_libsodium(KEY, 1 << 32, b"packet")


# ---- Forgeries ------------------------------------------------------------------------------------


@each_backend
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1500), min_size=1, max_size=64),
    which=st.integers(0, 63),
    place=st.integers(0, 1 << 20),
    bit=st.integers(0, 7),
)
def test_one_forged_packet_in_a_batch(backend: str, lengths: list[int], which: int, place: int, bit: int) -> None:
    which %= len(lengths)
    packets = [(index, random_bytes(length, index)) for index, length in enumerate(lengths)]
    sealed = [(counter, bytearray(sealed_by_libsodium(KEY, counter, plain))) for counter, plain in packets]
    forged = sealed[which][1]
    forged[place % len(forged)] ^= 1 << bit
    opened = AeadKey(KEY, backend).open([(counter, bytes(data)) for counter, data in sealed])
    assert [ok for ok, _ in opened] == [int(index != which) for index in range(len(packets))]
    for index, ((_, plain), (_, memory)) in enumerate(zip(packets, opened, strict=True)):
        assert index == which or memory[:-AEAD_TAG] == plain


@each_backend
@pytest.mark.parametrize("bit", range(128))
def test_every_bit_of_the_tag_counts(backend: str, bit: int) -> None:
    sealed = bytearray(sealed_by_libsodium(KEY, 1, b"packet"))
    sealed[-AEAD_TAG + bit // 8] ^= 1 << bit % 8
    assert AeadKey(KEY, backend).open([(1, bytes(sealed))])[0][0] == 0


@each_backend
@pytest.mark.parametrize("length", [16, 48, 64, 500, 1420])
def test_what_a_forgery_would_decrypt_to_is_not_seen(backend: str, length: int) -> None:
    plain = random_bytes(length, 3)
    sealed = bytearray(sealed_by_libsodium(KEY, 1, plain))
    sealed[-1] ^= 1
    ((ok, memory),) = AeadKey(KEY, backend).open([(1, bytes(sealed))])
    assert ok == 0
    assert not any(plain[start : start + 8] in memory for start in range(length - 7))


@each_backend
def test_wrong_key_wrong_counter_wrong_length(backend: str) -> None:
    sealed = sealed_by_libsodium(KEY, 5, b"packet of thirty-two bytes, here")
    assert AeadKey(KEY, backend).open([(5, sealed)])[0][0] == 1
    assert AeadKey(bytes(32), backend).open([(5, sealed)])[0][0] == 0
    batch = [(4, sealed), (5 + 2**32, sealed), (5, sealed[:-1]), (5, sealed[1:]), (5, sealed + b"\0")]
    assert [ok for ok, _ in AeadKey(KEY, backend).open(batch)] == [0] * len(batch)


@each_backend
def test_shorter_than_a_tag(backend: str) -> None:
    batch = [(0, bytes(length)) for length in range(AEAD_TAG)]
    assert AeadKey(KEY, backend).open(batch, MARGIN) == [(0, MARGIN + data + MARGIN) for _, data in batch]


# ---- Memory ---------------------------------------------------------------------------------------


@each_backend
@settings(max_examples=100, deadline=None)
@given(packets=packets_of_any_length, misalignment=st.integers(0, 64))
def test_nothing_is_written_outside_at_any_alignment(
    backend: str, packets: list[tuple[int, bytes]], misalignment: int
) -> None:
    margin = MARGIN[:misalignment]
    key = AeadKey(KEY, backend)
    batch = [(counter, sealed_by_libsodium(KEY, counter, plain)) for counter, plain in packets]
    assert key.seal(packets, margin) == [(1, margin + sealed + margin) for _, sealed in batch]
    for opened, (_, plain) in zip(key.open(batch, margin), packets, strict=True):
        ok, memory = opened
        assert ok == 1
        assert memory[: misalignment + len(plain)] == margin + plain
        assert memory[misalignment + len(plain) + AEAD_TAG :] == margin


@each_backend
def test_wiping_leaves_no_byte_of_the_key(backend: str) -> None:
    key = AeadKey(random_bytes(32, 9), backend)
    assert any(key.memory())
    key.wipe()
    assert not any(key.memory())
    key.wipe()


@each_backend
def test_many_keys_alive_do_not_meet(backend: str) -> None:
    material = [random_bytes(32, seed) for seed in range(100)]
    alive = [AeadKey(data, backend) for data in material]
    for key in alive[::3]:
        key.wipe()
    for index, (key, data) in enumerate(zip(alive, material, strict=True)):
        if index % 3:
            assert key.seal([(1, b"packet")]) == [(1, sealed_by_libsodium(data, 1, b"packet"))]


@each_backend
def test_one_key_seals_and_opens_by_turns(backend: str) -> None:
    key = AeadKey(KEY, backend)
    for counter in range(20):
        plain = random_bytes(counter * 33, counter)
        ((_, sealed),) = key.seal([(counter, plain)])
        assert sealed == sealed_by_libsodium(KEY, counter, plain)
        assert key.open([(counter, sealed[:-1] + bytes([sealed[-1] ^ 1]))])[0][0] == 0
        assert key.open([(counter, sealed)])[0][1][:-AEAD_TAG] == plain


@each_backend
def test_threads_with_a_key_each(backend: str) -> None:
    def work(seed: int) -> bool:
        material = random_bytes(32, seed)
        key = AeadKey(material, backend)
        packets = [(counter, random_bytes(1420, counter)) for counter in range(64)]
        expected = [(1, sealed_by_libsodium(material, *packet)) for packet in packets]
        return all(key.seal(packets) == expected for _ in range(20))

    for _ in range(2):  # the first round's threads are gone in the second
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))


# ---- The choice of the back end -------------------------------------------------------------------


def test_the_best_is_in_use_and_libcrypto_is_always_there() -> None:
    assert _testing.aead_backend() == BACKENDS[0]
    assert BACKENDS[-1] == "evp"
    with pytest.raises(ValueError, match="no such"):
        AeadKey(KEY, "such")


# Behaves as the real library, by libcrypto, but for the fault that a macro asks for.
FAKE = """
#include <intel-ipsec-mb.h>
#include <openssl/evp.h>
#include <stdlib.h>

#if !NO_SYMBOLS
static IMB_JOB the_job;
static IMB_JOB *next(IMB_MGR *manager) { return &the_job; }
static IMB_JOB *none(IMB_MGR *manager) { return NULL; }

static void encrypt(const IMB_JOB *job, const uint8_t *from, uint8_t *to)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    int length = job->msg_len_to_cipher_in_bytes;

    EVP_EncryptInit_ex2(context, EVP_chacha20_poly1305(), job->enc_keys, job->iv, NULL);
    if (length)
        EVP_EncryptUpdate(context, to, &length, from, length);
    EVP_EncryptFinal_ex(context, to, &length);
    EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, 16, job->auth_tag_output);
    EVP_CIPHER_CTX_free(context);
}

static IMB_JOB *submit(IMB_MGR *manager)
{
    uint8_t *again = malloc(the_job.msg_len_to_cipher_in_bytes + 1);

    encrypt(&the_job, the_job.src, the_job.dst);
    if (the_job.cipher_direction == IMB_DIR_DECRYPT)
        encrypt(&the_job, the_job.dst, again); /* for the tag, which is over the ciphertext */
    the_job.auth_tag_output[15] ^= WRONG_TAG;
    the_job.status = UNFINISHED ? IMB_STATUS_BEING_PROCESSED : IMB_STATUS_COMPLETED;
    free(again);
    return &the_job;
}

unsigned imb_get_version(void) { return IMB_VERSION_NUM - OLDER; }
IMB_MGR *alloc_mb_mgr(uint64_t flags) { return calloc(1, sizeof(IMB_MGR)); }
void free_mb_mgr(IMB_MGR *manager) { free(manager); }
void init_mb_mgr_auto(IMB_MGR *manager, IMB_ARCH *architecture)
{
    manager->get_next_job = next;
    manager->submit_job = manager->submit_job_nocheck = submit;
    manager->get_completed_job = manager->flush_job = none;
    *architecture = NARROW ? IMB_ARCH_SSE : IMB_ARCH_AVX512;
}
#endif
"""
FAULTS = ["NO_SYMBOLS", "OLDER", "NARROW", "WRONG_TAG", "UNFINISHED"]
HEADER = Path("/usr/include/intel-ipsec-mb.h")


@pytest.mark.skipif(
    "ipsec-mb" not in BACKENDS or not HEADER.exists() or shutil.which("cc") is None,
    reason="needs a build with intel-ipsec-mb, its header and cc",
)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_library_with_a_fault_is_not_used(fault: str | None, tmp_path: Path) -> None:
    version = re.search(r"IMB_VERSION_NUM\s+0x([0-9a-f]+)", HEADER.read_text())
    soname = f"libIPSec_MB.so.{int(version[1], 16) >> 16 if version else 2}"
    source = tmp_path / "fake.c"
    source.write_text(FAKE)
    macros = [f"-D{name}={int(name == fault)}" for name in FAULTS]
    subprocess.run(
        ["cc", "-shared", "-fPIC", *macros, "-o", str(tmp_path / soname), str(source), "-lcrypto"], check=True
    )
    shown = subprocess.run(
        [sys.executable, "-c", "from fasttun import _testing; print(*_testing.aead_backends())"],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == (["evp"] if fault else ["ipsec-mb", "evp"])
