/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BASE_ERROR_H
#define INTERLOCK_BASE_ERROR_H

#include <jansson.h>
#include <stdarg.h>

/*
 * Control-path errors: a class for QMP clients, one plain sentence naming what, where and why,
 * an optional hint saying what to do, and optional structured data (a refusal's conflicts).
 * The data path uses plain negative errno values instead.
 *
 * Every function that takes `struct error **err` leaves *err untouched on success; on failure it
 * stores a new error there (err may be NULL: the error is dropped) and returns a negative errno.
 * Thread-safe as long as one error object is used by one thread at a time.
 */
enum error_class {
    ERROR_GENERIC,           /* "GenericError" */
    ERROR_DEVICE_NOT_FOUND,  /* "DeviceNotFound" */
    ERROR_COMMAND_NOT_FOUND, /* "CommandNotFound" */
    ERROR_DEVICE_NOT_ACTIVE, /* "DeviceNotActive" */
};

struct error {
    enum error_class class;
    int code;      /* negative errno */
    char *message; /* one sentence, no newline, no full stop needed */
    char *hint;    /* NULL or what to do about it */
    json_t *data;  /* NULL or structured detail, owned */
};

/* Stores a new GenericError; returns `code` (negative errno) so callers can `return error_set(...)`. */
int error_set(struct error **err, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same with another class. */
int error_set_class(struct error **err, enum error_class class, int code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Adds ": strerror(-code)" to the sentence. */
int error_set_errno(struct error **err, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Puts "text: " before the sentence of *err; no-op when err or *err is NULL. */
void error_prepend(struct error **err, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Sets the hint (replaces an earlier one); no-op when err or *err is NULL. */
void error_hint(struct error **err, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Moves `from` into *err (or frees it when err is NULL); returns from->code. */
int error_move(struct error **err, struct error *from);
/* The sentence with the hint behind it, as clients are shown it; g_free(). */
char *error_format(const struct error *error);
const char *error_class_name(enum error_class class);
void error_free(struct error *error); /* accepts NULL */

static inline void error_cleanup(struct error **error)
{
    error_free(*error);
}
#define auto_error __attribute__((cleanup(error_cleanup))) struct error *

#endif
