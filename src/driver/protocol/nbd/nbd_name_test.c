/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names of NBD exports: what they become, what is refused, and that formatting and parsing agree. */
#include "driver/protocol/nbd/nbd_name.h"
#include <glib.h>

static const struct {
    const char *name, *options, *formatted; /* options NULL: refused; formatted NULL: not asked */
} names[] = {
    {"nbd://host", "{'type':'inet','host':'host','port':'10809'}", "nbd://host:10809"},
    {"nbd://host:11/", "{'type':'inet','host':'host','port':'11'}", "nbd://host:11"},
    {"nbd+tcp://[::1]:11/a%20b", "{'type':'inet','host':'::1','port':'11'} 'a b'", "nbd://[::1]:11/a%20b"},
    {"NBD://host/a/b", "{'type':'inet','host':'host','port':'10809'} 'a/b'", "nbd://host:10809/a/b"},
    {"nbd+unix:///e?socket=/s", "{'type':'unix','path':'/s'} 'e'", "nbd+unix:///e?socket=/s"},
    {"nbd+unix://?socket=/a%26b", "{'type':'unix','path':'/a&b'}", "nbd+unix://?socket=/a%26b"},
    {"nbd+unix:////e?socket=/s", "{'type':'unix','path':'/s'} '/e'", "nbd+unix:////e?socket=/s"},
    {"nbd:host:11", "{'type':'inet','host':'host','port':'11'}", "nbd://host:11"},
    {"nbd:[::1]:11:exportname=x:y", "{'type':'inet','host':'::1','port':'11'} 'x:y'", "nbd://[::1]:11/x:y"},
    {"nbd:unix:/s", "{'type':'unix','path':'/s'}", "nbd+unix://?socket=/s"},
    {"nbd:unix:/a:b:exportname=a?b", "{'type':'unix','path':'/a:b'} 'a?b'", "nbd+unix:///a%3Fb?socket=/a%3Ab"},
    {"nbds://host/x?tls-creds=t", "{'type':'inet','host':'host','port':'10809'} 'x' tls t", NULL},
    {"nbds+unix:///x?socket=/s&tls-creds=t&tls-hostname=h", "{'type':'unix','path':'/s'} 'x' tls t of h", NULL},
    {"nbd:host", NULL, NULL},
    {"nbd:host:", NULL, NULL},
    {"nbd:unix:", NULL, NULL},
    {"nbd+unix:///x", NULL, NULL},
    {"nbd+unix://host/x?socket=/s", NULL, NULL},
    {"nbd://host?socket=/s", NULL, NULL},
    {"nbd://host/x?tls-creds=t", NULL, NULL},
    {"nbd://user@host/x", NULL, NULL},
    {"nbd://host:port/x", NULL, NULL},
    {"nbds://host/x", NULL, NULL},
    {"nbd+unix:///x?socket=/s&socket=/t", NULL, NULL},
    {"nbd+unix:///x?socket=%zz", NULL, NULL},
};

static char *summary(json_t *options)
{
    g_autofree char *server = json_dumps(json_object_get(options, "server"), JSON_COMPACT);
    const char *export = json_string_value(json_object_get(options, "export"));
    const char *creds = json_string_value(json_object_get(options, "tls-creds"));
    const char *host = json_string_value(json_object_get(options, "tls-hostname"));
    char *text = g_strconcat(server, export ? " '" : "", export ? export : "", export ? "'" : "", creds ? " tls " : "",
                             creds ? creds : "", host ? " of " : "", host ? host : "", NULL);
    return g_strdelimit(text, "\"", '\'');
}

static char *formatted(json_t *options)
{
    struct blockdev_options *parsed;
    json_object_set_new(options, "node-name", json_string("n"));
    g_assert_cmpint(blockdev_options_from_json(options, "", &parsed, NULL), ==, 0);
    char *name = nbd_name_format(&parsed->u.nbd);
    blockdev_options_free(parsed);
    return name;
}

static void test_names(void)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        json_t *options = NULL;
        struct error *err = NULL;
        g_test_message("%s", names[i].name);
        g_assert_true(nbd_name_is(names[i].name));
        int r = nbd_name_parse(names[i].name, &options, &err);
        if (!names[i].options) {
            g_assert_cmpint(r, <, 0);
            g_assert_nonnull(err->hint);
            error_free(err);
            continue;
        }
        g_assert_cmpint(r, ==, 0);
        g_autofree char *text = summary(options);
        g_assert_cmpstr(text, ==, names[i].options);
        if (names[i].formatted) {
            g_autofree char *name = formatted(options), *again_text = NULL;
            json_t *again;
            g_assert_cmpstr(name, ==, names[i].formatted);
            g_assert_cmpint(nbd_name_parse(name, &again, NULL), ==, 0);
            again_text = summary(again);
            g_assert_cmpstr(again_text, ==, text);
            json_decref(again);
        }
        json_decref(options);
    }
    g_assert_false(nbd_name_is("/nbd:x"));
    g_assert_false(nbd_name_is("nbdx:y"));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/nbd-name/names", test_names);
    return g_test_run();
}
