/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BASE_SIZE_H
#define INTERLOCK_BASE_SIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Sizes, alignment and checked arithmetic. `alignment` is always a power of two. */
#define KiB ((uint64_t)1 << 10)
#define MiB ((uint64_t)1 << 20)
#define GiB ((uint64_t)1 << 30)
#define TiB ((uint64_t)1 << 40)
#define array_size(a) (sizeof(a) / sizeof((a)[0]))

static inline uint64_t align_down(uint64_t value, uint64_t alignment)
{
    return value & ~(alignment - 1);
}
/* Undefined when the result does not fit: check against a limit first. */
static inline uint64_t align_up(uint64_t value, uint64_t alignment)
{
    return align_down(value + alignment - 1, alignment);
}
static inline bool is_aligned(uint64_t value, uint64_t alignment)
{
    return (value & (alignment - 1)) == 0;
}
static inline bool is_power_of_two(uint64_t value)
{
    return value && (value & (value - 1)) == 0;
}
static inline uint64_t div_up(uint64_t value, uint64_t by)
{
    return value / by + (value % by != 0);
}
static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}
static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* "64 KiB", "1.5 GiB": writes to out and returns it. */
char *size_format(uint64_t bytes, char *out, size_t out_size);
/* "64k", "1G", "512": binary suffixes b,k,M,G,T,P,E (any case). Returns 0, -EINVAL or -ERANGE. */
int size_parse(const char *text, uint64_t *ret_bytes);

#endif
