/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_EXPLORE_VIEW_H
#define INTERLOCK_TEST_EXPLORE_VIEW_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * What whoever looks at an image may see: the bytes at the beginning, and every write of a client since, each with
 * when it was begun, acknowledged and flushed. Images that show the same (a base, once its top has been committed into
 * it) share one view.
 */
struct view {
    unsigned references;
    uint64_t size;
    unsigned char *initial; /* `size` bytes */
    GPtrArray *writes;      /* struct view_write, in order of begin; those in flight never overlap */
    uint64_t since, until;  /* of a frozen view: it shows one moment between these; 0: it is not one */
    bool unknown;           /* a commit into it did not end well: nothing is promised any more */
};
struct view_write {
    unsigned writer; /* a client's number */
    uint64_t offset, bytes;
    unsigned char *data;
    uint64_t begun, acknowledged; /* view_clock(); 0: not, or failed: then it may show or not, for ever */
    bool ended, flushed;
};

/* Counts the begins and ends of writes, of all views. */
uint64_t view_clock(void);

struct view *view_create(unsigned char *initial, uint64_t size); /* owns the bytes */
struct view *view_ref(struct view *view);
void view_unref(struct view *view); /* accepts NULL */
/* What lies behind the old end reads as zero; or is cut off. */
void view_resize(struct view *view, uint64_t size);

/* What the view shows at one moment from `since` (a value of the clock) until now: a copy or snapshot that was made
 * meanwhile. Writes that begin after this are the new view's own. settled: all that it shows is flushed. */
struct view *view_freeze(const struct view *view, uint64_t since, bool settled);

/* A write begins; NULL when another one is in flight there. `data` is copied; NULL: zeroes. */
struct view_write *view_write_begin(struct view *view, unsigned writer, uint64_t offset, uint64_t bytes,
                                    const unsigned char *data);
void view_write_end(struct view *view, struct view_write *write, bool good);
/* What a flush that begins now will make durable: hand the mark to view_flushed() when it has ended well. */
uint64_t view_flush_mark(void);
void view_flushed(struct view *view, uint64_t mark);

/* Who looks, and since when. */
struct view_look {
    uint64_t since;    /* view_clock() when the look began: older acknowledged writes must show */
    bool flushed_only; /* only flushed writes must show: after a crash, or an error */
    unsigned alone;    /* a client that was promised to be the only writer, or VIEW_NOBODY */
    uint64_t alone_since;
};
#define VIEW_NOBODY (~0u)
struct view_look view_look_now(void);
/* Compares what was seen. NULL: it may be; else where it differs and what was seen there; g_free(). */
char *view_compare(const struct view *view, const struct view_look *look, uint64_t offset, uint64_t bytes,
                   const unsigned char *seen);
/* Of a frozen view, of which the first `bytes` passed the comparison: is there one moment that all of it may be of?
 * Else a sentence; g_free(). */
char *view_compare_moment(const struct view *view, const struct view_look *look, uint64_t bytes,
                          const unsigned char *seen);

/* Content: words that tell who wrote them and where they belong. Zero is the absence of a tag. */
void content_fill(unsigned char *to, uint64_t offset, uint64_t bytes, uint32_t tag);
uint32_t content_image_tag(unsigned image, unsigned cluster);
uint32_t content_write_tag(unsigned writer, unsigned number);

#endif
