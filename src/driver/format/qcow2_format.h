/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_FORMAT_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_FORMAT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

/*
 * The qcow2 format on disk, versions 2 and 3, by the published specification ("Qcow2 Image File Format"; section names
 * stand at each part). Everything is big-endian. Limits without a section are this driver's own: what no sane image
 * exceeds and what keeps a hostile one from costing memory.
 */

/* Section "Header". */
struct qcow2_disk_header {
    uint32_t magic;
    uint32_t version;
    uint64_t backing_file_offset;
    uint32_t backing_file_size;
    uint32_t cluster_bits;
    uint64_t size;
    uint32_t crypt_method;
    uint32_t l1_size;
    uint64_t l1_table_offset;
    uint64_t refcount_table_offset;
    uint32_t refcount_table_clusters;
    uint32_t snapshot_count;
    uint64_t snapshots_offset;
    /* Version 3 on. */
    uint64_t incompatible_features;
    uint64_t compatible_features;
    uint64_t autoclear_features;
    uint32_t refcount_order;
    uint32_t header_length;
    /* "Additional fields": present if header_length says so. */
    uint8_t compression_type;
    uint8_t padding[7];
};
static_assert(offsetof(struct qcow2_disk_header, size) == 24, "layout");
static_assert(offsetof(struct qcow2_disk_header, l1_table_offset) == 40, "layout");
static_assert(offsetof(struct qcow2_disk_header, refcount_table_offset) == 48, "layout");
static_assert(offsetof(struct qcow2_disk_header, snapshots_offset) == 64, "layout");
static_assert(offsetof(struct qcow2_disk_header, incompatible_features) == 72, "layout");
static_assert(offsetof(struct qcow2_disk_header, header_length) == 100, "layout");
static_assert(offsetof(struct qcow2_disk_header, compression_type) == 104, "layout");
static_assert(sizeof(struct qcow2_disk_header) == 112, "layout");

enum {
    QCOW2_MAGIC = 0x514649fb,
    QCOW2_HEADER_SIZE_V2 = 72,
    QCOW2_HEADER_SIZE_V3 = 104, /* the least that version 3 allows */
    QCOW2_SECTOR = 512,
};

/* Section "Feature bits" of the header. */
enum qcow2_incompatible {
    QCOW2_INCOMPATIBLE_DIRTY = 1 << 0,
    QCOW2_INCOMPATIBLE_CORRUPT = 1 << 1,
    QCOW2_INCOMPATIBLE_DATA_FILE = 1 << 2,
    QCOW2_INCOMPATIBLE_COMPRESSION = 1 << 3,
    QCOW2_INCOMPATIBLE_EXTENDED_L2 = 1 << 4,
};
enum qcow2_compatible {
    QCOW2_COMPATIBLE_LAZY_REFCOUNTS = 1 << 0,
};
enum qcow2_autoclear {
    QCOW2_AUTOCLEAR_BITMAPS = 1 << 0,
    QCOW2_AUTOCLEAR_RAW_DATA_FILE = 1 << 1,
};
enum qcow2_crypt { QCOW2_CRYPT_NONE = 0, QCOW2_CRYPT_AES = 1, QCOW2_CRYPT_LUKS = 2 };
enum qcow2_compression { QCOW2_COMPRESSION_ZLIB = 0, QCOW2_COMPRESSION_ZSTD = 1 };

/* Section "Header extensions": type and length, then data padded to a multiple of 8. */
struct qcow2_disk_extension {
    uint32_t type;
    uint32_t length;
};
static_assert(sizeof(struct qcow2_disk_extension) == 8, "layout");
#define QCOW2_EXTENSION_END 0x00000000u
#define QCOW2_EXTENSION_BACKING_FORMAT 0xe2792acau
#define QCOW2_EXTENSION_FEATURE_NAMES 0x6803f857u
#define QCOW2_EXTENSION_BITMAPS 0x23852875u
#define QCOW2_EXTENSION_ENCRYPTION 0x0537be77u
#define QCOW2_EXTENSION_DATA_FILE 0x44415441u

/* Section "Feature name table". */
struct qcow2_disk_feature_name {
    uint8_t type; /* 0 incompatible, 1 compatible, 2 autoclear */
    uint8_t bit;
    char name[46]; /* padded with zeroes, not always terminated */
};
static_assert(sizeof(struct qcow2_disk_feature_name) == 48, "layout");

/* Section "Bitmaps extension", and "Bitmap directory". */
struct qcow2_disk_bitmaps {
    uint32_t bitmap_count;
    uint32_t reserved;
    uint64_t directory_size;
    uint64_t directory_offset;
};
static_assert(sizeof(struct qcow2_disk_bitmaps) == 24, "layout");
struct qcow2_disk_bitmap {
    uint64_t table_offset;
    uint32_t table_size; /* entries */
    uint32_t flags;
    uint8_t type;
    uint8_t granularity_bits;
    uint16_t name_size;
    uint32_t extra_size;
};
static_assert(sizeof(struct qcow2_disk_bitmap) == 24, "layout");
enum { QCOW2_BITMAP_IN_USE = 1 << 0, QCOW2_BITMAP_AUTO = 1 << 1 };

/* Section "Snapshots": the fixed part, then extra_size bytes, the id, the name, and padding to 8. */
struct qcow2_disk_snapshot {
    uint64_t l1_table_offset;
    uint32_t l1_size;
    uint16_t id_size;
    uint16_t name_size;
    uint32_t date_s;
    uint32_t date_ns;
    uint64_t vm_clock_ns;
    uint32_t vm_state_size;
    uint32_t extra_size;
};
static_assert(sizeof(struct qcow2_disk_snapshot) == 40, "layout");

/* Sections "L1 table entry", "L2 table entry", "Refcount table entry". */
#define QCOW2_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define QCOW2_COPIED (UINT64_C(1) << 63)
#define QCOW2_COMPRESSED (UINT64_C(1) << 62)
#define QCOW2_ZERO (UINT64_C(1) << 0)
#define QCOW2_L1_RESERVED UINT64_C(0x7f000000000001ff)
#define QCOW2_L2_RESERVED UINT64_C(0x3f000000000001fe)
#define QCOW2_REFCOUNT_TABLE_MASK UINT64_C(0xfffffffffffffe00)

/* Limits. */
enum {
    QCOW2_CLUSTER_BITS_MIN = 9,
    QCOW2_CLUSTER_BITS_MAX = 21,
    QCOW2_REFCOUNT_ORDER_MAX = 6,
    QCOW2_BACKING_NAME_MAX = 1023,
    QCOW2_DATA_NAME_MAX = 1023,
    QCOW2_EXTENDED_CLUSTER_BITS_MIN = 14, /* of images with extended L2 entries */
    QCOW2_L1_BYTES_MAX = 32 << 20,
    QCOW2_REFCOUNT_TABLE_BYTES_MAX = 8 << 20,
    QCOW2_SNAPSHOTS_MAX = 65536,
    QCOW2_SNAPSHOT_TABLE_BYTES_MAX = 64 << 20,
    QCOW2_SNAPSHOT_EXTRA_MAX = 1024,
    QCOW2_BITMAPS_MAX = 65535,
    QCOW2_BITMAP_DIRECTORY_BYTES_MAX = 64 << 20,
    QCOW2_BITMAP_TABLE_ENTRIES_MAX = 0x8000000,
};
#define QCOW2_HOST_OFFSET_MAX ((UINT64_C(1) << 56) - 1)

#endif
