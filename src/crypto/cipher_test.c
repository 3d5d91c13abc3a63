/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Known answers: hashes and PBKDF2 (RFC 6070, RFC 7914), XTS (IEEE 1619, vectors 4 and 10), CBC and CTR with what
 * OpenSSL computes for the same vectors of initialisation; the splitter by its definition; and that what is encrypted
 * comes back for every cipher, mode and length, on the loop as on the worker pool.
 */
#include "base/size.h"
#include "crypto/af_split.h"
#include "crypto/cipher.h"
#include "crypto/secret.h"
#include "loop/loop.h"
#include <errno.h>
#include <glib.h>
#include <glib/gstdio.h>
#include <string.h>

static void from_hex(const char *text, uint8_t *out)
{
    for (; *text; text += 2) {
        *out++ = (uint8_t)(g_ascii_xdigit_value(text[0]) << 4 | g_ascii_xdigit_value(text[1]));
    }
}

static void assert_hex(const uint8_t *data, const char *text)
{
    uint8_t wanted[HASH_BYTES_MAX];
    size_t bytes = strlen(text) / 2;
    from_hex(text, wanted);
    g_assert_cmpmem(data, bytes, wanted, bytes);
}

static void test_hashes(void)
{
    static const char *const of_abc[] = {
        [HASH_MD5] = "900150983cd24fb0d6963f7d28e17f72",
        [HASH_SHA1] = "a9993e364706816aba3e25717850c26c9cd0d89d",
        [HASH_SHA224] = "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7",
        [HASH_SHA256] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        [HASH_SHA384] = "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded163",
        [HASH_SHA512] = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea2",
        [HASH_RIPEMD160] = "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc",
        [HASH_SM3] = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0",
    };
    for (unsigned i = 0; i < HASH_COUNT; i++) {
        uint8_t digest[HASH_BYTES_MAX];
        enum hash_algorithm parsed;
        hash_digest(i, "a", 1, "bc", 2, digest);
        assert_hex(digest, of_abc[i]);
        g_assert_true(hash_parse(hash_name(i), &parsed) && parsed == i);
        g_assert_cmpuint(hash_bytes(i), >=, strlen(of_abc[i]) / 2);
    }
}

static void test_pbkdf2(void)
{
    uint8_t out[64];
    hash_pbkdf2(HASH_SHA1, "password", 8, (const uint8_t *)"salt", 4, 2, out, 20);
    assert_hex(out, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957");
    hash_pbkdf2(HASH_SHA1, "pass\0word", 9, (const uint8_t *)"sa\0lt", 5, 4096, out, 16);
    assert_hex(out, "56fa6aa75548099dcc37d7f03425e0c3");
    hash_pbkdf2(HASH_SHA256, "passwd", 6, (const uint8_t *)"salt", 4, 1, out, 64);
    assert_hex(out, "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
                    "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783");
}

/* `first` and `last` are 16 bytes each of what a sector is encrypted to. */
static void check_sector(struct cipher_config config, const char *key_text, uint64_t sector, bool counting,
                         const char *first, const char *last)
{
    uint8_t key[CIPHER_KEY_MAX], data[CIPHER_SECTOR], original[CIPHER_SECTOR];
    struct sector_cipher *cipher;
    size_t key_bytes;
    from_hex(key_text, key);
    int code = cipher_key_bytes(&config, &key_bytes, NULL);
    g_assert_cmpint(code, ==, 0);
    g_assert_cmpuint(key_bytes, ==, strlen(key_text) / 2);
    code = sector_cipher_create(&config, key, &cipher, NULL);
    g_assert_cmpint(code, ==, 0);
    for (unsigned i = 0; i < sizeof(data); i++) {
        original[i] = data[i] = counting ? (uint8_t)i : 0;
    }
    sector_cipher_encrypt(cipher, sector, data, sizeof(data));
    assert_hex(data, first);
    assert_hex(data + sizeof(data) - 16, last);
    sector_cipher_decrypt(cipher, sector, data, sizeof(data));
    g_assert_cmpmem(data, sizeof(data), original, sizeof(original));
    sector_cipher_destroy(cipher);
}

static void test_xts(void)
{
    check_sector((struct cipher_config){CIPHER_AES_128, CIPHER_XTS, CIPHER_IV_PLAIN64, HASH_SHA256},
                 "2718281828459045235360287471352631415926535897932384626433832795", 0, true,
                 "27a7479befa1d476489f308cd4cfa6e2", "0a282df920147beabe421ee5319d0568");
    check_sector((struct cipher_config){CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_PLAIN64, HASH_SHA256},
                 "2718281828459045235360287471352662497757247093699959574966967627"
                 "3141592653589793238462643383279502884197169399375105820974944592",
                 0xff, true, "1c3b3a102f770386e4836c99e370cf9b", "c4f36ffda9fcea70b9c6e693e148c151");
}

static void test_cbc_ctr(void)
{
    const char *key = "000102030405060708090a0b0c0d0e0f";
    check_sector((struct cipher_config){CIPHER_AES_128, CIPHER_CBC, CIPHER_IV_ESSIV, HASH_SHA256}, key, 5, false,
                 "cf353a91aa5f5ddd71a62976229fedd6", "c6086ce5b4af5d646be3ddabb45321e6");
    check_sector((struct cipher_config){CIPHER_AES_128, CIPHER_CBC, CIPHER_IV_PLAIN, HASH_SHA256}, key,
                 UINT64_C(0x100000005), false, "789dc76ccb52ce1c3db90ecb357af60e", "179785700bbb5b8c6b334e7718949454");
    check_sector((struct cipher_config){CIPHER_AES_128, CIPHER_CTR, CIPHER_IV_PLAIN64, HASH_SHA256}, key,
                 UINT64_C(0x100000005), false, "0a18a6e750989acc6fbc58d73b08b2fb", "bd2f2bcef2e8b903dd365f7b28f84bf4");
}

/* --- every cipher there is --- */

static bool is_possible(const struct cipher_config *config)
{
    size_t bytes;
    return cipher_key_bytes(config, &bytes, NULL) == 0;
}

static void coroutine_fn check_round_trip(const struct cipher_config *config, size_t bytes, uint64_t sector)
{
    uint8_t key[CIPHER_KEY_MAX];
    struct sector_cipher *cipher;
    g_autofree uint8_t *data = g_malloc(bytes + 1), *one_by_one = g_malloc(bytes), *original = g_malloc(bytes);
    uint8_t *odd = data + 1; /* not aligned */
    uint64_t seed = bytes;
    for (unsigned i = 0; i < sizeof(key); i++) {
        key[i] = (uint8_t)(i * 7 + config->algorithm);
    }
    for (size_t i = 0; i < bytes; i++) {
        original[i] = (uint8_t)(i * 31 + (seed >> 3));
    }
    memcpy(odd, original, bytes);
    memcpy(one_by_one, original, bytes);
    int code = sector_cipher_create(config, key, &cipher, NULL);
    g_assert_cmpint(code, ==, 0);
    sector_cipher_run(cipher, true, sector, odd, bytes);
    for (size_t at = 0; at < bytes; at += CIPHER_SECTOR) {
        sector_cipher_encrypt(cipher, sector + at / CIPHER_SECTOR, one_by_one + at, CIPHER_SECTOR);
    }
    g_assert_true(memcmp(odd, one_by_one, bytes) == 0);
    g_assert_true(memcmp(odd, original, bytes) != 0);
    sector_cipher_run(cipher, false, sector, odd, bytes);
    g_assert_true(memcmp(odd, original, bytes) == 0);
    sector_cipher_destroy(cipher);
}

static void coroutine_fn round_trips(void *argument)
{
    static const size_t lengths[] = {512, 9 * 512, 17 * 512, 200 * 512};
    unsigned possible = 0;
    for (unsigned i = 0; i < CIPHER_ALGORITHM_COUNT * CIPHER_MODE_COUNT * CIPHER_IV_COUNT; i++) {
        struct cipher_config config = {i % CIPHER_ALGORITHM_COUNT, i / CIPHER_ALGORITHM_COUNT % CIPHER_MODE_COUNT,
                                       i / CIPHER_ALGORITHM_COUNT / CIPHER_MODE_COUNT, HASH_SHA256};
        if (is_possible(&config)) {
            possible++;
            for (unsigned n = 0; n < G_N_ELEMENTS(lengths); n++) {
                check_round_trip(&config, lengths[n], UINT64_C(0xfffffffe) + n);
            }
        }
    }
    /* 9 ciphers of 16-byte blocks in 4 modes with 3 vectors; cast5 in 3 modes with 2. */
    g_assert_cmpuint(possible, ==, 9 * 4 * 3 + 3 * 2);
    check_round_trip(&(struct cipher_config){CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_PLAIN64, HASH_SHA256}, 3 * MiB + 512,
                     12345);
}

static void test_round_trips(void)
{
    struct loop *loop;
    int code = loop_create(ENGINE_AUTO, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    loop_run_coroutine(loop, round_trips, NULL);
    loop_destroy(loop);
}

static void test_names(void)
{
    static const struct {
        const char *name, *mode;
        size_t key_bytes;
        bool good;
        const char *built;
    } cases[] = {
        {"aes", "xts-plain64", 64, true, NULL},
        {"aes", "xts-plain64", 48, true, NULL},
        {"aes", "cbc-essiv:sha256", 32, true, NULL},
        {"serpent", "cbc-plain", 24, true, NULL},
        {"cast5", "cbc-plain64", 16, true, NULL},
        {"aes", "ecb", 16, true, "ecb-plain"},
        {"aes", "xts-plain64", 16, false, NULL},
        {"aes", "xts-plain64", 0, false, NULL},
        {"aes", "xts-plain64", SIZE_MAX, false, NULL},
        {"aes", "xts", 64, false, NULL},
        {"aes", "cbc-essiv", 32, false, NULL},
        {"aes", "cbc-essiv:sha1", 32, false, NULL},
        {"aes", "cbc-essiv:none", 32, false, NULL},
        {"aes", "cbc-plain:sha256", 32, false, NULL},
        {"aes", "", 32, false, NULL},
        {"aes", "-", 32, false, NULL},
        {"cast5", "xts-plain64", 32, false, NULL},
        {"cast5", "cbc-essiv:sha256", 16, false, NULL},
        {"des", "cbc-plain", 8, false, NULL},
        {"anubis", "cbc-plain", 32, false, NULL},
        {"", "cbc-plain", 32, false, NULL},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        struct cipher_config config;
        auto_error error = NULL;
        int code = cipher_from_luks(cases[i].name, cases[i].mode, cases[i].key_bytes, &config, &error);
        g_assert_cmpint(code == 0, ==, cases[i].good);
        g_assert_cmpint(error == NULL, ==, cases[i].good);
        if (code == 0) {
            g_autofree char *mode = cipher_luks_mode(&config);
            g_assert_cmpstr(mode, ==, cases[i].built ? cases[i].built : cases[i].mode);
            g_assert_cmpstr(cipher_luks_name(config.algorithm), ==, cases[i].name);
        }
    }
}

/* --- the splitter --- */

static void test_af_split(void)
{
    uint8_t key[64], split[64 * 50], back[64], digest[HASH_BYTES_MAX], random[64 * 49];
    for (unsigned i = 0; i < sizeof(random); i++) {
        random[i] = (uint8_t)(i * 13 + i / 200);
    }
    memset(key, 0x5a, sizeof(key));
    for (unsigned hash = 0; hash < HASH_COUNT; hash++) {
        af_split(hash, key, 32, 50, random, split);
        af_merge(hash, split, 32, 50, back);
        g_assert_cmpmem(back, 32, key, 32);
        split[32 * 20] ^= 1; /* any bit of any stripe */
        af_merge(hash, split, 32, 50, back);
        g_assert_cmpint(memcmp(back, key, 32), !=, 0);
    }
    /* Two stripes of 32 bytes with SHA-1: H(0 || first 20), H(1 || other 12) cut. */
    af_split(HASH_SHA1, key, 32, 2, random, split);
    g_assert_cmpmem(split, 32, random, 32);
    hash_digest(HASH_SHA1, "\0\0\0\0", 4, random, 20, digest);
    for (unsigned i = 0; i < 20; i++) {
        g_assert_cmpint(split[32 + i], ==, digest[i] ^ key[i]);
    }
    hash_digest(HASH_SHA1, "\0\0\0\1", 4, random + 20, 12, digest);
    for (unsigned i = 0; i < 12; i++) {
        g_assert_cmpint(split[52 + i], ==, digest[i] ^ key[20 + i]);
    }
}

/* --- secrets --- */

static void coroutine_fn check_secret(const char *id, const char *wanted)
{
    uint8_t *secret;
    size_t bytes;
    int code = secret_get(id, &secret, &bytes, NULL);
    g_assert_cmpint(code, ==, 0);
    g_assert_cmpmem(secret, bytes, wanted, strlen(wanted));
    g_assert_cmpint(secret[bytes], ==, 0);
    secret_free(secret, bytes);
}

static void coroutine_fn refuse_secret(struct secret_options options, int wanted)
{
    auto_error error = NULL;
    int code = secret_add(&options, &error);
    g_assert_cmpint(code, ==, wanted);
    g_assert_nonnull(error);
    g_assert_null(strstr(error->message, "hunter"));
}

static void coroutine_fn secrets(void *argument)
{
    g_autofree char *path = g_build_filename(g_get_tmp_dir(), "interlock-secret-XXXXXX", NULL);
    int code, fd = g_mkstemp(path);
    g_assert_cmpint(fd, >=, 0);
    g_close(fd, NULL);
    g_assert_true(g_file_set_contents(path, "MTIzNDU2\n", -1, NULL));

    code = secret_add(&(struct secret_options){.id = "plain", .data = "hunter2"}, NULL);
    g_assert_cmpint(code, ==, 0);
    code = secret_add(&(struct secret_options){.id = "coded", .data = "MTIzNDU2", .base64 = true}, NULL);
    g_assert_cmpint(code, ==, 0);
    code = secret_add(&(struct secret_options){.id = "file", .file = path, .base64 = true}, NULL);
    g_assert_cmpint(code, ==, 0);
    code = secret_add(&(struct secret_options){.id = "raw-file", .file = path}, NULL);
    g_assert_cmpint(code, ==, 0);
    check_secret("plain", "hunter2");
    check_secret("coded", "123456");
    check_secret("file", "123456");
    check_secret("raw-file", "MTIzNDU2\n");

    /* printf 0123456789abcdef0123456789abcdef; hunter3 with IV 16 * 'i', by openssl enc -aes-256-cbc */
    code = secret_add(&(struct secret_options){.id = "key", .data = "0123456789abcdef0123456789abcdef"}, NULL);
    g_assert_cmpint(code, ==, 0);
    code = secret_add(&(struct secret_options){.id = "hidden",
                                               .data = "CGQmQ6k+9AV3K6hIoi5tvA==",
                                               .base64 = true,
                                               .keyid = "key",
                                               .iv = "aWlpaWlpaWlpaWlpaWlpaQ=="},
                      NULL);
    g_assert_cmpint(code, ==, 0);
    check_secret("hidden", "hunter3");

    refuse_secret((struct secret_options){.id = "plain", .data = "hunter4"}, -EEXIST);
    refuse_secret((struct secret_options){.id = "x"}, -EINVAL);
    refuse_secret((struct secret_options){.id = "x", .data = "hunter4", .file = path}, -EINVAL);
    refuse_secret((struct secret_options){.id = "x", .data = "hunter4%", .base64 = true}, -EINVAL);
    refuse_secret((struct secret_options){.id = "x", .file = "/nonexistent"}, -ENOENT);
    refuse_secret((struct secret_options){.id = "x", .data = "hunter4", .iv = "aWlpaQ=="}, -EINVAL);
    refuse_secret((struct secret_options){.id = "x", .data = "hunter4", .keyid = "nobody"}, -ENOENT);
    refuse_secret((struct secret_options){.id = "x", .data = "hunter4", .keyid = "key"}, -EINVAL);
    refuse_secret((struct secret_options){.id = "x", .data = "hunter4", .keyid = "plain"}, -EINVAL);
    refuse_secret(
        (struct secret_options){.id = "x", .data = "hunter4", .keyid = "key", .iv = "aWlpaWlpaWlpaWlpaWlpaQ=="},
        -EINVAL);
    refuse_secret(
        (struct secret_options){
            .id = "x", .data = "0123456789abcdef", .keyid = "key", .iv = "aWlpaWlpaWlpaWlpaWlpaQ=="},
        -EINVAL);

    code = secret_remove("plain", NULL);
    g_assert_cmpint(code, ==, 0);
    g_assert_false(secret_exists("plain"));
    code = secret_remove("plain", NULL);
    g_assert_cmpint(code, ==, -ENOENT);
    secret_remove_all();
    g_assert_false(secret_exists("key"));
    g_unlink(path);
}

static void test_secrets(void)
{
    struct loop *loop;
    int code = loop_create(ENGINE_AUTO, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    loop_run_coroutine(loop, secrets, NULL);
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/crypto/hashes", test_hashes);
    g_test_add_func("/crypto/pbkdf2", test_pbkdf2);
    g_test_add_func("/crypto/xts", test_xts);
    g_test_add_func("/crypto/cbc-ctr", test_cbc_ctr);
    g_test_add_func("/crypto/round-trips", test_round_trips);
    g_test_add_func("/crypto/names", test_names);
    g_test_add_func("/crypto/af-split", test_af_split);
    g_test_add_func("/crypto/secrets", test_secrets);
    return g_test_run();
}
