/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* KEY=VALUE texts and what they become, as JSON; NULL: refused. */
#include "tool/keyval.h"
#include <glib.h>
#include <stdlib.h>

static const struct {
    const char *text, *implied, *json;
} cases[] = {
    {"driver=qcow2,node-name=n", NULL, "{\"driver\":\"qcow2\",\"node-name\":\"n\"}"},
    {"qcow2,node-name=n", "driver", "{\"driver\":\"qcow2\",\"node-name\":\"n\"}"},
    {"file.driver=file,file.filename=/a,,b", NULL, "{\"file\":{\"driver\":\"file\",\"filename\":\"/a,b\"}}"},
    {"a.0=x,a.1=y", NULL, "{\"a\":[\"x\",\"y\"]}"},
    {"a.1=x", NULL, "{\"a\":{\"1\":\"x\"}}"},
    {"a=", NULL, "{\"a\":\"\"}"},
    {"a=b=c", NULL, "{\"a\":\"b=c\"}"},
    {"", NULL, "{}"},
    {"{\"a\": [1, true]}", NULL, "{\"a\":[1,true]}"},
    {"a=1,a=2", NULL, NULL},
    {"a=1,a.b=2", NULL, NULL},
    {"a.b=2,a=1", NULL, NULL},
    {"a.b=1,a.b.c=2", NULL, NULL},
    {"x,y", "driver", NULL},
    {"nokey", NULL, NULL},
    {"=v", NULL, NULL},
    {"a..b=1", NULL, NULL},
    {".a=1", NULL, NULL},
    {"a b=1", NULL, NULL},
    {"{\"a\": 1", NULL, NULL},
    {"{\"a\": 1, \"a\": 2}", NULL, NULL},
    {"a=\xff", NULL, NULL},
};

static void test_cases(void)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        json_t *json = NULL;
        bool text;
        auto_error err = NULL;
        int code = keyval_parse(cases[i].text, cases[i].implied, &json, &text, &err);

        if (!cases[i].json) {
            g_assert_cmpint(code, <, 0);
            g_assert_nonnull(err);
            g_assert_null(json);
            continue;
        }
        g_assert_cmpint(code, ==, 0);
        char *dumped = json_dumps(json, JSON_COMPACT);

        g_assert_cmpstr(dumped, ==, cases[i].json);
        free(dumped);
        json_decref(json);
    }
}

static void test_too_deep(void)
{
    g_autoptr(GString) key = g_string_new("a");
    json_t *json = NULL;
    bool text;
    auto_error err = NULL;

    for (unsigned i = 0; i < 100; i++) {
        g_string_append(key, ".a");
    }
    g_string_append(key, "=1");
    g_assert_cmpint(keyval_parse(key->str, NULL, &json, &text, &err), <, 0);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/tool/keyval/cases", test_cases);
    g_test_add_func("/tool/keyval/too-deep", test_too_deep);
    return g_test_run();
}
