/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tests of error.c: what setters store, how decorations compose, and that a NULL err is accepted everywhere. */
#include "base/error.h"

#include <errno.h>
#include <glib.h>

static void test_set(void)
{
    auto_error error = NULL;
    g_assert_cmpint(error_set(&error, -EINVAL, "bad %s", "thing"), ==, -EINVAL);
    g_assert_cmpstr(error->message, ==, "bad thing");
    g_assert_cmpint(error->code, ==, -EINVAL);
    g_assert_cmpstr(error_class_name(error->class), ==, "GenericError");
    g_assert_null(error->hint);
    g_assert_null(error->data);
}

static void test_errno_text(void)
{
    auto_error error = NULL;
    errno = EDOM;
    g_assert_cmpint(error_set_errno(&error, -ENOENT, "opening '%s'", "x"), ==, -ENOENT);
    g_assert_cmpstr(error->message, ==, "opening 'x': No such file or directory");
    g_assert_cmpint(errno, ==, EDOM);
}

static void test_decorate(void)
{
    auto_error error = NULL;
    error_set_class(&error, ERROR_DEVICE_NOT_FOUND, -ENODEV, "no node '%s'", "a");
    error_prepend(&error, "block-%s", "commit");
    error_hint(&error, "use %d", 1);
    error_hint(&error, "use %d", 2);
    g_assert_cmpstr(error->message, ==, "block-commit: no node 'a'");
    g_assert_cmpstr(error->hint, ==, "use 2");
    g_assert_cmpstr(error_class_name(error->class), ==, "DeviceNotFound");
    struct error *moved = NULL;
    error->data = json_object();
    g_assert_cmpint(error_move(&moved, g_steal_pointer(&error)), ==, -ENODEV);
    g_assert_nonnull(moved->data);
    g_assert_cmpint(error_move(NULL, moved), ==, -ENODEV);
}

static void test_null(void)
{
    struct error *none = NULL;
    g_assert_cmpint(error_set(NULL, -EIO, "dropped"), ==, -EIO);
    g_assert_cmpint(error_set_errno(NULL, -EIO, "dropped"), ==, -EIO);
    error_prepend(NULL, "x");
    error_prepend(&none, "x");
    error_hint(NULL, "x");
    error_hint(&none, "x");
    g_assert_null(none);
    error_free(NULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/error/set", test_set);
    g_test_add_func("/error/errno-text", test_errno_text);
    g_test_add_func("/error/decorate", test_decorate);
    g_test_add_func("/error/null", test_null);
    return g_test_run();
}
