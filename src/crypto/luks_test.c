/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * LUKS1 headers over memory: what is refused of a hostile one, making and unlocking, the rules of key slots, and that a
 * power cut at any write of a change leaves a header that a secret from before or the new one opens.
 */
#include "base/seeded.h"
#include "base/size.h"
#include "crypto/luks.h"
#include "crypto/luks_format.h"
#include "loop/loop.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <stddef.h>
#include <string.h>

enum { SECTOR = 512 };

/* --- a disk in memory --- */

struct memory {
    uint8_t *now, *stable;
    size_t bytes;
    GArray *pending;                      /* uint64_t: sectors written since the last flush */
    void (*check)(struct memory *memory); /* before each flush, and after each write; or NULL */
    void *argument;
    uint64_t random;
};

static int coroutine_fn memory_read(void *argument, uint64_t offset, void *to, size_t bytes)
{
    const struct memory *memory = argument;
    g_assert_cmpuint(offset + bytes, <=, memory->bytes);
    memcpy(to, memory->now + offset, bytes);
    return 0;
}

static int coroutine_fn memory_write(void *argument, uint64_t offset, const void *from, size_t bytes)
{
    struct memory *memory = argument;
    g_assert_cmpuint(offset + bytes, <=, memory->bytes);
    memcpy(memory->now + offset, from, bytes);
    for (uint64_t sector = offset / SECTOR; sector < div_up(offset + bytes, SECTOR); sector++) {
        g_array_append_val(memory->pending, sector);
    }
    if (memory->check) {
        memory->check(memory);
    }
    return 0;
}

static int coroutine_fn memory_flush(void *argument)
{
    struct memory *memory = argument;
    memcpy(memory->stable, memory->now, memory->bytes);
    g_array_set_size(memory->pending, 0);
    return 0;
}

static struct luks_io memory_io(struct memory *memory, size_t bytes)
{
    *memory = (struct memory){g_malloc0(bytes), g_malloc0(bytes), bytes, g_array_new(FALSE, FALSE, 8), NULL, NULL, 1};
    return (struct luks_io){memory_read, memory_write, memory_flush, memory, bytes};
}

static void memory_free(struct memory *memory)
{
    g_free(memory->now);
    g_free(memory->stable);
    g_array_free(memory->pending, TRUE);
}

static void run(void (*entry)(void *argument))
{
    struct loop *loop;
    int code = loop_create(ENGINE_AUTO, &loop, NULL);
    g_assert_cmpint(code, ==, 0);
    loop_run_coroutine(loop, entry, NULL);
    loop_destroy(loop);
}

/* Small keys and few iterations: what is slow about a real one is not what is tested. */
static struct luks_options quick(void)
{
    struct luks_options options;
    luks_options_default(&options);
    options.cipher.algorithm = CIPHER_AES_128;
    options.cipher.mode = CIPHER_CBC;
    options.iterations = 1;
    return options;
}

static void coroutine_fn create(const struct luks_io *io, const char *passphrase, struct luks_header *ret)
{
    struct luks_options options = quick();
    int code = luks_create(io, &options, (const uint8_t *)passphrase, strlen(passphrase), ret, NULL);
    g_assert_cmpint(code, ==, 0);
}

static int coroutine_fn unlock(const struct luks_io *io, const char *passphrase, uint8_t *key)
{
    struct luks_header header;
    int code = luks_read(io, &header, NULL);
    g_assert_cmpint(code, ==, 0);
    return luks_unlock(io, &header, 0, (const uint8_t *)passphrase, strlen(passphrase), key, NULL);
}

/* --- hostile headers --- */

struct damage {
    const char *why; /* NULL: none */
    unsigned at, width;
    uint64_t value;
    const char *text; /* or this */
};
#define FIELD(member, number) \
    offsetof(struct luks_disk_header, member), sizeof(((struct luks_disk_header *)0)->member), number, NULL
#define TEXT(member, text) offsetof(struct luks_disk_header, member), 0, 0, text

static void coroutine_fn hostile(void *argument)
{
    static const struct damage damages[] = {
        {NULL, 0, 0, 0, NULL},
        {"no LUKS header", TEXT(magic, "LUKT")},
        {"version 2", FIELD(version, 2)},
        {"version 0", FIELD(version, 0)},
        {"has no end", TEXT(cipher_name, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")},
        {"has no end", TEXT(hash_name, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")},
        {"not text", TEXT(cipher_mode, "cbc\nplain")},
        {"cipher 'rot13'", TEXT(cipher_name, "rot13")},
        {"mode 'lrw-benbi'", TEXT(cipher_mode, "lrw-benbi")},
        {"hash 'whirlpool'", TEXT(hash_name, "whirlpool")},
        {"keys of 0 bytes", FIELD(key_bytes, 0)},
        {"keys of 17 bytes", FIELD(key_bytes, 17)},
        {"keys of 4294967295 bytes", FIELD(key_bytes, UINT32_MAX)},
        {"digest wants 0", FIELD(digest_iterations, 0)},
        {"digest wants 4294967295", FIELD(digest_iterations, UINT32_MAX)},
        {"payload lies in the header", FIELD(payload_sector, 1)},
        {NULL, FIELD(payload_sector, 0)}, /* detached */
        {"slot 0 is corrupt: its state", FIELD(slots[0].active, 1)},
        {"slot 7 is corrupt: its state", FIELD(slots[7].active, UINT32_MAX)},
        {"slot 0 wants 0 iterations", FIELD(slots[0].iterations, 0)},
        {"slot 0 wants 4294967295", FIELD(slots[0].iterations, UINT32_MAX)},
        {"has 0 stripes", FIELD(slots[0].stripes, 0)},
        {"has 4294967295 stripes", FIELD(slots[0].stripes, UINT32_MAX)},
        {"lies in the header", FIELD(slots[0].key_sector, 0)},
        {"lies in the header", FIELD(slots[0].key_sector, 1)},
        {"lies in the payload", FIELD(slots[0].key_sector, UINT32_MAX)},
        {NULL, FIELD(slots[1].stripes, UINT32_MAX)}, /* not active: whatever */
        {NULL, FIELD(slots[1].key_sector, 8)},
    };
    struct memory memory;
    struct luks_io io = memory_io(&memory, 1 * MiB);
    struct luks_header header;
    create(&io, "a", &header);
    for (unsigned i = 0; i < G_N_ELEMENTS(damages); i++) {
        const struct damage *damage = &damages[i];
        uint8_t data[LUKS_HEADER_BYTES];
        auto_error error = NULL;
        memcpy(data, memory.now, sizeof(data));
        if (damage->text) {
            memcpy(data + damage->at, damage->text, strlen(damage->text) + (strlen(damage->text) < 32));
        }
        for (unsigned n = 0; n < damage->width; n++) {
            data[damage->at + n] = damage->value >> (damage->width - 1 - n) * 8;
        }
        int code = luks_parse(data, &header, &error);
        if (damage->why ? code == 0 || !strstr(error->message, damage->why) : code < 0) {
            g_error("damage %u: expected '%s', got '%s'", i, damage->why ? damage->why : "success",
                    error ? error->message : "success");
        }
    }
    /* Two slots in one place; and one whose material is not there. */
    int code = luks_read(&io, &header, NULL);
    g_assert_cmpint(code, ==, 0);
    header.slots[1] = header.slots[0];
    luks_build(&header, memory.now);
    code = luks_read(&io, &header, NULL);
    g_assert_cmpint(code, ==, -EINVAL);
    header.slots[1].active = false;
    luks_build(&header, memory.now);
    uint8_t key[CIPHER_KEY_MAX];
    io.size = 60000;
    code = unlock(&io, "a", key);
    g_assert_cmpint(code, ==, -EINVAL);
    io.size = LUKS_HEADER_BYTES - 1;
    code = luks_read(&io, &header, NULL);
    g_assert_cmpint(code, ==, -EINVAL);
    memory_free(&memory);
}

static void test_hostile(void)
{
    run(hostile);
}

/* --- slots --- */

static int coroutine_fn amend(const struct luks_io *io, struct luks_amendment change, const char *current,
                              const char *new_secret, const char *old_secret)
{
    struct luks_header header;
    auto_error error = NULL;
    int code = luks_read(io, &header, NULL);
    g_assert_cmpint(code, ==, 0);
    change.current = (struct luks_secret){(const uint8_t *)current, current ? strlen(current) : 0};
    change.new_secret = (struct luks_secret){(const uint8_t *)new_secret, new_secret ? strlen(new_secret) : 0};
    change.old_secret = (struct luks_secret){(const uint8_t *)old_secret, old_secret ? strlen(old_secret) : 0};
    change.iterations = 1;
    code = luks_amend(io, &header, &change, &error);
    g_assert_cmpint(code == 0, ==, error == NULL);
    return code;
}

static int coroutine_fn activate(const struct luks_io *io, int slot, bool force, const char *current,
                                 const char *new_secret)
{
    return amend(io, (struct luks_amendment){.activate = true, .slot = slot, .force = force}, current, new_secret,
                 NULL);
}

static int coroutine_fn deactivate(const struct luks_io *io, int slot, bool force, const char *old_secret)
{
    return amend(io, (struct luks_amendment){.slot = slot, .force = force}, NULL, NULL, old_secret);
}

static unsigned coroutine_fn active_mask(const struct luks_io *io)
{
    struct luks_header header;
    unsigned mask = 0;
    int code = luks_read(io, &header, NULL);
    g_assert_cmpint(code, ==, 0);
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        mask |= header.slots[i].active << i;
    }
    return mask;
}

#define expect(call, wanted)                \
    do {                                    \
        int code_ = (call);                 \
        g_assert_cmpint(code_, ==, wanted); \
    } while (0)

static void coroutine_fn slots(void *argument)
{
    struct memory memory;
    struct luks_io io = memory_io(&memory, 1 * MiB);
    struct luks_header header;
    uint8_t key[CIPHER_KEY_MAX] = {0}, again[CIPHER_KEY_MAX] = {0};
    create(&io, "a", &header);
    expect(unlock(&io, "a", key), 0);
    expect(unlock(&io, "b", again), -EACCES);
    expect(activate(&io, -1, false, "a", "b"), 0);
    expect(unlock(&io, "b", again), 1);
    g_assert_cmpmem(again, 16, key, 16);
    expect(activate(&io, 6, false, "wrong", "c"), -EACCES);
    expect(activate(&io, 6, false, "b", "c"), 0);
    expect(activate(&io, 7, false, "c", "d"), 0);
    expect(activate(&io, 7, false, "c", "e"), -EEXIST);
    expect(activate(&io, 8, false, "c", "e"), -EINVAL);
    expect(activate(&io, 8, true, "c", "e"), -EINVAL);
    expect(activate(&io, 2, false, "c", NULL), -EINVAL);
    g_assert_cmphex(active_mask(&io), ==, 0xc3);
    expect(unlock(&io, "d", again), 7);
    g_assert_cmpmem(again, 16, key, 16);

    /* Overwriting leaves as many slots as before. */
    expect(activate(&io, 0, true, "d", "f"), 0);
    g_assert_cmphex(active_mask(&io), ==, 0xc3);
    expect(unlock(&io, "a", again), -EACCES);
    expect(unlock(&io, "f", again), 0);
    g_assert_cmpmem(again, 16, key, 16);

    expect(deactivate(&io, 3, false, NULL), -EINVAL);
    expect(deactivate(&io, -1, false, NULL), -EINVAL);
    expect(deactivate(&io, -1, false, "nobody"), -EINVAL);
    expect(deactivate(&io, 6, false, "d"), -EINVAL);
    expect(deactivate(&io, 6, false, "c"), 0);
    g_assert_cmphex(active_mask(&io), ==, 0x83);
    for (unsigned i = 0; i < 5; i++) { /* all of them full */
        expect(activate(&io, -1, false, "d", "same"), 0);
    }
    g_assert_cmphex(active_mask(&io), ==, 0xff);
    expect(activate(&io, -1, false, "d", "one more"), -ENOSPC);
    expect(activate(&io, 1, true, "d", "replaced"), 0);
    expect(unlock(&io, "replaced", again), 1);
    expect(deactivate(&io, -1, false, "same"), 0);
    g_assert_cmphex(active_mask(&io), ==, 0x83);
    expect(deactivate(&io, 0, false, NULL), 0);
    expect(deactivate(&io, 1, false, NULL), 0);
    expect(deactivate(&io, 7, false, NULL), -EPERM);
    expect(deactivate(&io, -1, false, "d"), -EPERM);
    expect(unlock(&io, "d", again), 7);
    expect(luks_read(&io, &header, NULL), 0);
    expect(luks_unlock(&io, &header, 7, (const uint8_t *)"d", 1, again, NULL), 7);
    expect(deactivate(&io, -1, true, "d"), 0);
    expect(unlock(&io, "d", again), -EACCES);
    g_assert_cmphex(active_mask(&io), ==, 0);
    /* Who kept the old header finds no key material any more. */
    expect(luks_unlock(&io, &header, 7, (const uint8_t *)"d", 1, again, NULL), -EACCES);
    memory_free(&memory);
}

static void test_slots(void)
{
    run(slots);
}

/* --- power cuts --- */

struct cuts {
    const char *secrets[3]; /* one of them opens what is left */
    unsigned checked;
};

static void coroutine_fn check_cut(struct memory *memory)
{
    struct cuts *cuts = memory->argument;
    struct memory left = {.now = g_memdup2(memory->stable, memory->bytes), .bytes = memory->bytes};
    struct luks_io io = {memory_read, NULL, NULL, &left, memory->bytes};
    uint8_t key[CIPHER_KEY_MAX];
    unsigned mode = seeded_next(&memory->random) % 3; /* all that was written, some, or none */
    for (unsigned i = 0; i < memory->pending->len; i++) {
        uint64_t sector = g_array_index(memory->pending, uint64_t, i);
        if (mode == 0 || (mode == 1 && seeded_next(&memory->random) % 2)) {
            memcpy(left.now + sector * SECTOR, memory->now + sector * SECTOR, SECTOR);
        }
    }
    bool opened = false;
    for (unsigned i = 0; i < G_N_ELEMENTS(cuts->secrets) && !opened; i++) {
        opened = cuts->secrets[i] && unlock(&io, cuts->secrets[i], key) >= 0;
    }
    g_assert_true(opened);
    cuts->checked++;
    g_free(left.now);
}

/* Several times, so that what is left of the pending sectors differs. */
static void coroutine_fn check_cuts(struct memory *memory)
{
    for (unsigned i = 0; i < 6; i++) {
        check_cut(memory);
    }
}

static void coroutine_fn power_cuts(void *argument)
{
    struct memory memory;
    struct luks_io io = memory_io(&memory, 1 * MiB);
    struct luks_header header;
    struct cuts cuts = {{"a", NULL, NULL}, 0};
    create(&io, "a", &header);
    memory.check = check_cuts;
    memory.argument = &cuts;
    for (unsigned slot = 1; slot < LUKS_SLOTS; slot++) { /* "a" is never touched */
        expect(activate(&io, slot, false, "a", "b"), 0);
    }
    cuts.secrets[0] = "b";
    expect(deactivate(&io, 0, false, NULL), 0);
    for (unsigned slot = 1; slot < LUKS_SLOTS; slot++) { /* each secret overwrites the one before, alone at the end */
        if (slot < 6) {
            expect(deactivate(&io, slot, false, NULL), 0);
        }
    }
    expect(deactivate(&io, 7, false, NULL), 0);
    g_assert_cmphex(active_mask(&io), ==, 0x40);
    cuts.secrets[1] = "c";
    expect(activate(&io, 6, true, "b", "c"), 0); /* the only one, in place, across the two sectors */
    g_assert_cmphex(active_mask(&io), ==, 0x40);
    cuts.secrets[0] = NULL;
    expect(activate(&io, -1, false, "c", "d"), 0);
    cuts.secrets[1] = "d";
    expect(deactivate(&io, 6, false, "c"), 0);
    g_assert_cmpuint(cuts.checked, >=, 6 * 40);
    memory_free(&memory);
}

static void test_power_cuts(void)
{
    run(power_cuts);
}

/* --- as options say --- */

static void coroutine_fn iteration_time(void *argument)
{
    struct memory memory;
    struct luks_io io = memory_io(&memory, 4 * MiB);
    struct luks_options options;
    struct luks_header header, read;
    uint64_t bytes;
    luks_options_default(&options);
    options.iter_time_ms = 10;
    expect(luks_new_bytes(&options, &bytes, NULL), 0);
    g_assert_cmpuint(bytes, ==, 2068480);
    expect(luks_create(&io, &options, (const uint8_t *)"a", 1, &header, NULL), 0);
    g_assert_cmpuint(header.slots[0].iterations, >=, LUKS_ITERATIONS_MIN);
    g_assert_cmpuint(header.digest_iterations, >=, LUKS_ITERATIONS_MIN);
    g_assert_cmpuint(header.payload_offset, ==, bytes);
    expect(luks_read(&io, &read, NULL), 0);
    g_assert_cmpmem(&read, sizeof(read), &header, sizeof(header));
    g_assert_cmpuint(strlen(header.uuid), ==, 36);
    io.size = bytes - 1;
    expect(luks_create(&io, &options, (const uint8_t *)"a", 1, &header, NULL), -ENOSPC);
    options.cipher.algorithm = CIPHER_DES;
    expect(luks_new_bytes(&options, &bytes, NULL), -ENOTSUP);
    memory_free(&memory);
}

static void test_iteration_time(void)
{
    run(iteration_time);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/luks/hostile", test_hostile);
    g_test_add_func("/luks/slots", test_slots);
    g_test_add_func("/luks/power-cuts", test_power_cuts);
    g_test_add_func("/luks/iteration-time", test_iteration_time);
    return g_test_run();
}
