/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The file of blkdebug's rules: what is read, and what is refused with which line. */
#include "driver/filter/blkdebug_rules.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

static int read_text(struct blkdebug_rules *rules, const char *text, struct error **err)
{
    return blkdebug_rules_read(rules, text, strlen(text), err);
}

static void test_good(void)
{
    struct blkdebug_rules rules;
    bool immediately = true;
    blkdebug_rules_init(&rules);
    g_assert_cmpint(read_text(&rules,
                              "# a comment\n"
                              "[inject-error]\n"
                              "event = \"read_aio\"\n"
                              "errno = \"28\"\n"
                              "once=\"on\"\r\n"
                              "\n"
                              "  [set-state \"a name\"]  # and another\n"
                              "\tevent = \"write_aio\" # here too\n"
                              "new_state = \"2\"\n"
                              "[inject-error]\n"
                              "event = \"none\"\nstate = \"2\"\nsector = \"3\"\niotype = \"read\"",
                              NULL),
                    ==, 0);
    g_assert_cmpuint(rules.count, ==, 3);
    g_assert_null(blkdebug_rules_event(&rules, BLKDEBUG_EVENT_READ_AIO));
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_WRITE, 0, 1, &immediately), ==, -ENOSPC);
    g_assert_false(immediately);
    g_assert_cmpuint(rules.count, ==, 2);
    g_assert_null(blkdebug_rules_event(&rules, BLKDEBUG_EVENT_NONE)); /* in state 1 */
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_READ, 1536, 1, &immediately), ==, 0);
    g_assert_null(blkdebug_rules_event(&rules, BLKDEBUG_EVENT_WRITE_AIO));
    g_assert_null(blkdebug_rules_event(&rules, BLKDEBUG_EVENT_NONE));
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_READ, 1536, 1, &immediately), ==, -EIO);
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_READ, 1535, 1, &immediately), ==, 0);
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_READ, 2047, 1, &immediately), ==, -EIO);
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_READ, 2048, 1, &immediately), ==, 0);
    g_assert_cmpint(blkdebug_rules_request(&rules, BLKDEBUG_IOTYPE_WRITE, 1536, 1, &immediately), ==, 0);
    blkdebug_rules_finish(&rules);
}

static void test_bad(void)
{
    static const struct {
        const char *text, *pattern;
    } cases[] = {
        {"event = \"none\"\n", "Line 1*first section"},
        {"\n[foo]\n", "Line 2*no others"},
        {"[inject-error\n", "Line 1*"},
        {"[inject-error] x\n", "Line 1*"},
        {"[inject-error \"x]\n", "Line 1*"},
        {"[inject-error]\nevent=none\n", "Line 2*double quotes"},
        {"[inject-error]\nevent = \"none\n", "Line 2*double quotes"},
        {"[inject-error]\nevent = \"none\" x\n", "Line 2*"},
        {"[inject-error]\n= \"none\"\n", "Line 2*"},
        {"[inject-error]\nevent = \"none\"\nevent = \"none\"\n", "Line 3*already"},
        {"[inject-error]\nevent = \"bogus\"\n", "The section in line 1*bogus*"},
        {"\n[inject-error]\nerrno = \"5\"\n", "The section in line 2*event*"},
        {"[inject-error]\nevent = \"none\"\nbad = \"5\"\n", "The section in line 1*bad*"},
        {"[inject-error]\nevent = \"none\"\nonce = \"maybe\"\n", "The section in line 1*once*"},
        {"[inject-error]\nevent = \"none\"\nerrno = \"x\"\n", "The section in line 1*errno*"},
        {"[set-state]\nevent = \"none\"\n", "The section in line 1*new_state*"},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        struct blkdebug_rules rules;
        auto_error error = NULL;
        g_autofree char *text = g_strconcat("", cases[i].text, "[inject-error]\nevent = \"none\"\n", NULL);
        blkdebug_rules_init(&rules);
        g_assert_cmpint(read_text(&rules, text, &error), <, 0);
        if (!g_pattern_match_simple(cases[i].pattern, error->message)) {
            g_error("'%s' is not '%s'", error->message, cases[i].pattern);
        }
        g_assert_cmpuint(rules.count, ==, 0); /* all or none */
        blkdebug_rules_finish(&rules);
    }
}

static void test_limit(void)
{
    g_autoptr(GString) text = g_string_new(NULL);
    struct blkdebug_rules rules;
    for (unsigned i = 0; i < BLKDEBUG_RULES_MAX / 2 + 1; i++) {
        g_string_append(text, "[inject-error]\nevent = \"none\"\n");
    }
    blkdebug_rules_init(&rules);
    g_assert_cmpint(read_text(&rules, text->str, NULL), ==, 0);
    g_assert_cmpint(read_text(&rules, text->str, NULL), ==, -E2BIG);
    g_assert_cmpuint(rules.count, ==, BLKDEBUG_RULES_MAX / 2 + 1);
    blkdebug_rules_finish(&rules);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/blkdebug-rules/good", test_good);
    g_test_add_func("/blkdebug-rules/bad", test_bad);
    g_test_add_func("/blkdebug-rules/limit", test_limit);
    return g_test_run();
}
