/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_NBD_NBD_FORMAT_H
#define INTERLOCK_EXPORT_NBD_NBD_FORMAT_H

#include <assert.h>
#include <endian.h>
#include <stdint.h>

/* The NBD protocol's numbers and messages (proto.md of the NetworkBlockDevice project; extended headers: the same on
 * its branch extension-ext-header). Everything is big-endian. */

#define NBD_MAGIC UINT64_C(0x4e42444d41474943)        /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_OPTION_REPLY_MAGIC UINT64_C(0x0003e889045565a9)
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_CHUNK_MAGIC 0x668e33efu
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71u
#define NBD_EXTENDED_CHUNK_MAGIC 0x6e8a278cu

#define NBD_STRING_MAX 4096u               /* names and descriptions */
#define NBD_OPTION_MAX (64u * 1024)        /* data of one option that we read at all */
#define NBD_OPTION_SKIP_MAX (1024u * 1024) /* data of one option that we skip; behind that we disconnect */
#define NBD_PAYLOAD_MAX (32u * 1024 * 1024)

enum nbd_handshake_flag { NBD_FIXED_NEWSTYLE = 1 << 0, NBD_NO_ZEROES = 1 << 1 };

enum nbd_option {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_LIST = 3,
    NBD_OPT_STARTTLS = 5,
    NBD_OPT_INFO = 6,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
    NBD_OPT_LIST_META_CONTEXT = 9,
    NBD_OPT_SET_META_CONTEXT = 10,
    NBD_OPT_EXTENDED_HEADERS = 11,
};

enum nbd_option_reply {
    NBD_REP_ACK = 1,
    NBD_REP_SERVER = 2,
    NBD_REP_INFO = 3,
    NBD_REP_META_CONTEXT = 4,
};
#define NBD_REP_ERR(n) (UINT32_C(0x80000000) + (n))
#define NBD_REP_ERR_UNSUP NBD_REP_ERR(1)
#define NBD_REP_ERR_POLICY NBD_REP_ERR(2)
#define NBD_REP_ERR_INVALID NBD_REP_ERR(3)
#define NBD_REP_ERR_TLS_REQD NBD_REP_ERR(5)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR(6)
#define NBD_REP_ERR_SHUTDOWN NBD_REP_ERR(7)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERR(9)
#define NBD_REP_ERR_EXT_HEADER_REQD NBD_REP_ERR(10)

enum nbd_info { NBD_INFO_EXPORT = 0, NBD_INFO_NAME = 1, NBD_INFO_DESCRIPTION = 2, NBD_INFO_BLOCK_SIZE = 3 };

enum nbd_transmission_flag {
    NBD_FLAG_HAS_FLAGS = 1 << 0,
    NBD_FLAG_READ_ONLY = 1 << 1,
    NBD_FLAG_SEND_FLUSH = 1 << 2,
    NBD_FLAG_SEND_FUA = 1 << 3,
    NBD_FLAG_SEND_TRIM = 1 << 5,
    NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
    NBD_FLAG_SEND_DF = 1 << 7,
    NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
    NBD_FLAG_SEND_CACHE = 1 << 10,
    NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12,
};

enum nbd_command {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7,
    NBD_CMD_COUNT
};

enum nbd_command_flag {
    NBD_CMD_FLAG_FUA = 1 << 0,
    NBD_CMD_FLAG_NO_HOLE = 1 << 1,
    NBD_CMD_FLAG_DF = 1 << 2,
    NBD_CMD_FLAG_REQ_ONE = 1 << 3,
    NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
    NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5, /* extended headers: the length is that of a payload */
};

#define NBD_CHUNK_DONE 1u /* the only flag of a chunk */
enum nbd_chunk_type {
    NBD_CHUNK_NONE = 0,
    NBD_CHUNK_OFFSET_DATA = 1,
    NBD_CHUNK_OFFSET_HOLE = 2,
    NBD_CHUNK_BLOCK_STATUS = 5,
    NBD_CHUNK_BLOCK_STATUS_EXT = 6,
    NBD_CHUNK_ERROR = 0x8001,
    NBD_CHUNK_ERROR_OFFSET = 0x8002,
};

enum nbd_error {
    NBD_SUCCESS = 0,
    NBD_EPERM = 1,
    NBD_EIO = 5,
    NBD_ENOMEM = 12,
    NBD_EINVAL = 22,
    NBD_ENOSPC = 28,
    NBD_EOVERFLOW = 75,
    NBD_ENOTSUP = 95,
    NBD_ESHUTDOWN = 108,
};

/* Contexts: what they are called, and the flags of their extents. The second and third are the peer's: how many images
 * down the data are (0: nowhere, 1: in the uppermost), and whether a dirty bitmap has them. */
#define NBD_CONTEXT_ALLOCATION "base:allocation"
#define NBD_CONTEXT_DEPTH "qemu:allocation-depth"
#define NBD_CONTEXT_BITMAP "qemu:dirty-bitmap:"
enum nbd_state { NBD_STATE_HOLE = 1 << 0, NBD_STATE_ZERO = 1 << 1 };
enum nbd_bitmap_state { NBD_STATE_DIRTY = 1 << 0 };

/* What was negotiated: how requests and replies look. Each can do what the one before it can. */
enum nbd_style { NBD_SIMPLE, NBD_STRUCTURED, NBD_EXTENDED };

#define NBD_WIRE __attribute__((packed))

struct nbd_greeting {
    uint64_t magic, option_magic;
    uint16_t flags;
} NBD_WIRE;
static_assert(sizeof(struct nbd_greeting) == 18, "proto.md, newstyle negotiation");

struct nbd_option_header {
    uint64_t magic;
    uint32_t option, bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_option_header) == 16, "proto.md, newstyle negotiation");

struct nbd_option_reply_header {
    uint64_t magic;
    uint32_t option, type, bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_option_reply_header) == 20, "proto.md, fixed newstyle negotiation");

struct nbd_export_name_reply {
    uint64_t size;
    uint16_t flags;
    uint8_t zeroes[124]; /* not sent when both sides said NBD_NO_ZEROES */
} NBD_WIRE;
static_assert(sizeof(struct nbd_export_name_reply) == 134, "proto.md, NBD_OPT_EXPORT_NAME");

struct nbd_info_export {
    uint16_t type;
    uint64_t size;
    uint16_t flags;
} NBD_WIRE;
static_assert(sizeof(struct nbd_info_export) == 12, "proto.md, NBD_INFO_EXPORT");

struct nbd_info_block_size {
    uint16_t type;
    uint32_t minimum, preferred, maximum;
} NBD_WIRE;
static_assert(sizeof(struct nbd_info_block_size) == 14, "proto.md, NBD_INFO_BLOCK_SIZE");

struct nbd_request_header {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_request_header) == 28, "proto.md, request message");

struct nbd_simple_reply {
    uint32_t magic, error;
    uint64_t cookie;
} NBD_WIRE;
static_assert(sizeof(struct nbd_simple_reply) == 16, "proto.md, simple reply message");

struct nbd_chunk {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie;
    uint32_t bytes; /* of what follows */
} NBD_WIRE;
static_assert(sizeof(struct nbd_chunk) == 20, "proto.md, structured reply chunk message");

struct nbd_extended_request_header {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset, bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_extended_request_header) == 32, "proto.md, extended request message");

struct nbd_extended_chunk {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie;
    uint64_t offset; /* the request's */
    uint64_t bytes;  /* of what follows */
} NBD_WIRE;
static_assert(sizeof(struct nbd_extended_chunk) == 32, "proto.md, extended reply chunk message");

/* What follows a chunk's head, of either kind. */
struct nbd_body_data { /* then the data */
    uint64_t offset;
} NBD_WIRE;
static_assert(sizeof(struct nbd_body_data) == 8, "proto.md, NBD_REPLY_TYPE_OFFSET_DATA");

struct nbd_body_hole {
    uint64_t offset;
    uint32_t bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_body_hole) == 12, "proto.md, NBD_REPLY_TYPE_OFFSET_HOLE");

struct nbd_body_error { /* then the message */
    uint32_t error;
    uint16_t message_bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_body_error) == 6, "proto.md, NBD_REPLY_TYPE_ERROR");

struct nbd_body_status { /* then the extents */
    uint32_t context;
} NBD_WIRE;
static_assert(sizeof(struct nbd_body_status) == 4, "proto.md, NBD_REPLY_TYPE_BLOCK_STATUS");

struct nbd_status_extent {
    uint32_t bytes, flags;
} NBD_WIRE;
static_assert(sizeof(struct nbd_status_extent) == 8, "proto.md, NBD_REPLY_TYPE_BLOCK_STATUS");

struct nbd_body_extended_status { /* then the extents */
    uint32_t context, count;
} NBD_WIRE;
static_assert(sizeof(struct nbd_body_extended_status) == 8, "proto.md, NBD_REPLY_TYPE_BLOCK_STATUS_EXT");

struct nbd_extended_status_extent {
    uint64_t bytes, flags;
} NBD_WIRE;
static_assert(sizeof(struct nbd_extended_status_extent) == 16, "proto.md, NBD_REPLY_TYPE_BLOCK_STATUS_EXT");

/* The payload that a request for block status may have. */
struct nbd_status_payload { /* then the contexts, a uint32_t each */
    uint64_t bytes;
} NBD_WIRE;
static_assert(sizeof(struct nbd_status_payload) == 8, "proto.md, NBD_CMD_BLOCK_STATUS");

#endif
