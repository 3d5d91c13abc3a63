/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading and building the table of snapshots. It is read when it is needed, whole, and not kept.
 *
 * 1. Nothing is trusted: how many entries and how long they are is limited, so a small file costs little memory. Where
 *    an L1 table lies is checked by whoever follows it.
 * 2. Extra data are kept as they are, unknown ones too; what they do not say is filled in (disk size: the image's).
 *    A snapshot of ours has 24 bytes of them: size of the VM state, size of the disk, instruction count.
 */
#include "driver/format/qcow2_snapshot_table.h"
#include "base/size.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

/* In the extra data. */
enum { EXTRA_VM_STATE = 0, EXTRA_DISK_SIZE = 8, EXTRA_ICOUNT = 16, EXTRA_SIZE = 24 };
#define NSEC_PER_SEC UINT64_C(1000000000)

void qcow2_snapshot_free(struct qcow2_snapshot *snapshot)
{
    if (snapshot) {
        g_free(snapshot->id);
        g_free(snapshot->name);
        g_free(snapshot->extra);
        g_free(snapshot);
    }
}

static void free_item(void *item)
{
    qcow2_snapshot_free(item);
}

void qcow2_snapshot_table_clear(struct qcow2_snapshot_table *table)
{
    g_clear_pointer(&table->snapshots, g_ptr_array_unref);
}

static uint64_t extra_word(const struct qcow2_snapshot *snapshot, unsigned at, uint64_t otherwise)
{
    uint64_t word;
    if (snapshot->extra_size < at + sizeof(word)) {
        return otherwise;
    }
    memcpy(&word, snapshot->extra + at, sizeof(word));
    return be64toh(word);
}

static int coroutine_fn read_entry(struct qcow2 *image, uint64_t at, struct qcow2_snapshot *to, uint64_t *ret_bytes)
{
    struct edge *file = image->node->file;
    struct qcow2_disk_snapshot disk;
    int code = edge_read_memory(file, at, &disk, sizeof(disk));
    if (code < 0) {
        return code;
    }
    uint16_t id_size = be16toh(disk.id_size);
    uint16_t name_size = be16toh(disk.name_size);
    to->extra_size = be32toh(disk.extra_size);
    if (to->extra_size > QCOW2_SNAPSHOT_EXTRA_MAX) {
        return -EFBIG;
    }
    uint64_t rest = (uint64_t)to->extra_size + id_size + name_size;
    g_autofree uint8_t *data = g_malloc(rest + 1);
    code = rest ? edge_read_memory(file, at + sizeof(disk), data, rest) : 0;
    if (code < 0) {
        return code;
    }
    to->extra = g_memdup2(data, to->extra_size);
    to->id = g_strndup((char *)data + to->extra_size, id_size);
    to->name = g_strndup((char *)data + to->extra_size + id_size, name_size);
    to->l1_offset = be64toh(disk.l1_table_offset);
    to->l1_size = be32toh(disk.l1_size);
    to->date_s = be32toh(disk.date_s);
    to->date_ns = be32toh(disk.date_ns);
    to->vm_clock_ns = be64toh(disk.vm_clock_ns);
    to->vm_state_size = extra_word(to, EXTRA_VM_STATE, be32toh(disk.vm_state_size));
    to->disk_size = extra_word(to, EXTRA_DISK_SIZE, image->header.size);
    to->icount = extra_word(to, EXTRA_ICOUNT, UINT64_MAX);
    to->has_icount = to->icount != UINT64_MAX;
    *ret_bytes = align_up(sizeof(disk) + rest, 8);
    return 0;
}

int coroutine_fn qcow2_snapshot_table_read(struct qcow2 *image, struct qcow2_snapshot_table *ret, struct error **err)
{
    struct qcow2_snapshot_table table = {g_ptr_array_new_with_free_func(free_item), 0};
    uint64_t at = image->header.snapshots_offset;
    for (uint32_t i = 0; i < image->header.snapshot_count; i++) {
        struct qcow2_snapshot *snapshot = g_new0(struct qcow2_snapshot, 1);
        uint64_t bytes = 0;
        g_ptr_array_add(table.snapshots, snapshot);
        int code = read_entry(image, at + table.bytes, snapshot, &bytes);
        table.bytes += bytes;
        if (code == 0 && table.bytes > QCOW2_SNAPSHOT_TABLE_BYTES_MAX) {
            code = -EFBIG;
        }
        if (code < 0) {
            qcow2_snapshot_table_clear(&table);
            return error_set_errno(err, code, "Could not read the snapshot table of node '%s'", image->node->name);
        }
    }
    *ret = table;
    return 0;
}

struct qcow2_snapshot *qcow2_snapshot_find(const struct qcow2_snapshot_table *table, const char *name)
{
    for (unsigned i = 0; i < table->snapshots->len; i++) {
        struct qcow2_snapshot *snapshot = table->snapshots->pdata[i];
        if (g_str_equal(snapshot->id, name)) {
            return snapshot;
        }
    }
    for (unsigned i = 0; i < table->snapshots->len; i++) {
        struct qcow2_snapshot *snapshot = table->snapshots->pdata[i];
        if (g_str_equal(snapshot->name, name)) {
            return snapshot;
        }
    }
    return NULL;
}

char *qcow2_snapshot_new_id(const struct qcow2_snapshot_table *table)
{
    uint64_t highest = 0;
    for (unsigned i = 0; i < table->snapshots->len; i++) {
        const struct qcow2_snapshot *snapshot = table->snapshots->pdata[i];
        uint64_t number = g_ascii_strtoull(snapshot->id, NULL, 10);
        highest = number < UINT64_MAX - 1 ? max_u64(highest, number) : highest;
    }
    return g_strdup_printf("%" G_GUINT64_FORMAT, highest + 1);
}

static void put_word(uint8_t *extra, unsigned at, uint64_t value)
{
    uint64_t word = htobe64(value);
    memcpy(extra + at, &word, sizeof(word));
}

struct qcow2_snapshot *qcow2_snapshot_create(const struct snapshot_info *info, char *id, uint64_t disk_size)
{
    struct qcow2_snapshot *snapshot = g_new0(struct qcow2_snapshot, 1);
    *snapshot = (struct qcow2_snapshot){
        .id = id,
        .name = g_strdup(info->name),
        .date_s = info->date_sec,
        .date_ns = info->date_nsec,
        .vm_clock_ns = info->vm_clock_sec * NSEC_PER_SEC + info->vm_clock_nsec,
        .vm_state_size = info->vm_state_size,
        .disk_size = disk_size,
        .has_icount = info->has_icount,
        .icount = info->has_icount ? (uint64_t)info->icount : UINT64_MAX,
        .extra_size = EXTRA_SIZE,
        .extra = g_malloc(EXTRA_SIZE),
    };
    put_word(snapshot->extra, EXTRA_VM_STATE, snapshot->vm_state_size);
    put_word(snapshot->extra, EXTRA_DISK_SIZE, disk_size);
    put_word(snapshot->extra, EXTRA_ICOUNT, snapshot->icount);
    return snapshot;
}

/* Names are bytes; what is shown is text. */
static char *as_text(const char *bytes)
{
    return g_utf8_make_valid(bytes, -1);
}

struct snapshot_info *qcow2_snapshot_describe(const struct qcow2_snapshot *snapshot)
{
    struct snapshot_info *info = g_new0(struct snapshot_info, 1);
    *info = (struct snapshot_info){
        .id = as_text(snapshot->id),
        .name = as_text(snapshot->name),
        .vm_state_size = min_u64(snapshot->vm_state_size, INT64_MAX),
        .date_sec = snapshot->date_s,
        .date_nsec = snapshot->date_ns,
        .vm_clock_sec = snapshot->vm_clock_ns / NSEC_PER_SEC,
        .vm_clock_nsec = snapshot->vm_clock_ns % NSEC_PER_SEC,
        .has_icount = snapshot->has_icount,
        .icount = snapshot->has_icount ? (int64_t)snapshot->icount : 0,
    };
    return info;
}

static void append_entry(GByteArray *to, const struct qcow2_snapshot *snapshot)
{
    static const uint8_t zeroes[8];
    uint64_t small = min_u64(snapshot->vm_state_size, UINT32_MAX);
    struct qcow2_disk_snapshot disk = {
        .l1_table_offset = htobe64(snapshot->l1_offset),
        .l1_size = htobe32(snapshot->l1_size),
        .id_size = htobe16(strlen(snapshot->id)),
        .name_size = htobe16(strlen(snapshot->name)),
        .date_s = htobe32(snapshot->date_s),
        .date_ns = htobe32(snapshot->date_ns),
        .vm_clock_ns = htobe64(snapshot->vm_clock_ns),
        .vm_state_size = htobe32(small),
        .extra_size = htobe32(snapshot->extra_size),
    };
    g_byte_array_append(to, (const uint8_t *)&disk, sizeof(disk));
    g_byte_array_append(to, snapshot->extra, snapshot->extra_size);
    g_byte_array_append(to, (const uint8_t *)snapshot->id, strlen(snapshot->id));
    g_byte_array_append(to, (const uint8_t *)snapshot->name, strlen(snapshot->name));
    g_byte_array_append(to, zeroes, align_up(to->len, 8) - to->len);
}

int qcow2_snapshot_table_build(const struct qcow2_snapshot_table *table, GByteArray **ret)
{
    if (table->snapshots->len > QCOW2_SNAPSHOTS_MAX) {
        return -EFBIG;
    }
    g_autoptr(GByteArray) bytes = g_byte_array_new();
    for (unsigned i = 0; i < table->snapshots->len; i++) {
        append_entry(bytes, table->snapshots->pdata[i]);
        if (bytes->len > QCOW2_SNAPSHOT_TABLE_BYTES_MAX) {
            return -EFBIG;
        }
    }
    *ret = g_steal_pointer(&bytes);
    return 0;
}
