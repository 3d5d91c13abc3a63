/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tests of json_stream.c: the same answers however the bytes are cut up, limits, and finding the way back. */
#include "control/json_stream.h"

#include <glib.h>
#include <stdbool.h>
#include <string.h>

/* What comes out of `text` fed in pieces of `piece` bytes: values in compact form, "!" for an error, one per line. */
static char *run(const char *text, size_t size, size_t piece)
{
    struct json_stream *stream = json_stream_create();
    GString *out = g_string_new(NULL);
    for (size_t at = 0; at < size; at += piece) {
        json_stream_feed(stream, text + at, MIN(piece, size - at));
        while (true) {
            json_t *json = NULL;
            auto_error error = NULL;
            enum json_stream_result result = json_stream_next(stream, &json, &error);
            g_assert_true((result == JSON_STREAM_ERROR) == (error != NULL));
            if (result == JSON_STREAM_MORE) {
                break;
            }
            char *value = json ? json_dumps(json, JSON_COMPACT | JSON_ENCODE_ANY) : strdup("!");
            g_string_append_printf(out, "%s\n", value);
            free(value);
            json_decref(json);
        }
    }
    json_stream_destroy(stream);
    return g_string_free(out, FALSE);
}

static void test_cases(void)
{
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"{\"a\":1}", "{\"a\":1}\n"},
        {" {\"a\": [1, {\"b\": \"}]\"}]}\n{}", "{\"a\":[1,{\"b\":\"}]\"}]}\n{}\n"},
        {"{}{}[]", "{}\n{}\n[]\n"},
        {"{'a': 'it\\'s \"so\"'}", "{\"a\":\"it's \\\"so\\\"\"}\n"},
        {"\"x\\\"y\" 12 true ", "\"x\\\"y\"\n12\ntrue\n"},
        {"12{}", "12\n{}\n"},
        {"}{}", "!\n{}\n"},
        {"bogus {}", "!\n{}\n"},
        {", : {}", "!\n!\n{}\n"},
        {"{\"a\":bogus}{}", "!\n{}\n"},
        {"{\"a\":1]{}", "!\n{}\n"},
        {"{\"a\":1,\"a\":2}{}", "!\n{}\n"},
        {"{\"a\":\"x\n{}", "!\n{}\n"},
        {"{\"a\":[1,\xff{}", "!\n{}\n"},
        {"{\"a\":\"\\u0000\"}{}", "!\n{}\n"},
        {"{\"a\":\"\xc3\x28\"}{}", "!\n{}\n"},
        {"{\"a\":\"\\x\"}{}", "!\n{}\n"},
        {"{\"a\":123456789012345678901234567890}{}", "!\n{}\n"},
        {"{\"a\"", ""},
        {"", ""},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        size_t size = strlen(cases[i].text);
        for (size_t piece = 1; piece <= MAX(size, 1); piece++) {
            g_autofree char *out = run(cases[i].text, size, piece);
            g_assert_cmpstr(out, ==, cases[i].expected);
        }
    }
}

static void test_zero_bytes(void)
{
    g_autofree char *out = run("\0{\0}{}", 6, 6);
    g_assert_cmpstr(out, ==, "!\n!\n{}\n");
}

static void test_too_long(void)
{
    g_autoptr(GString) text = g_string_new("{\"a\":\"");
    for (unsigned i = 0; i < (JSON_STREAM_MAX_BYTES >> 4); i++) {
        g_string_append(text, "0123456789{}[]:,");
    }
    g_string_append(text, "\"}{\"b\":2}");
    g_autofree char *out = run(text->str, text->len, 4096);
    g_assert_cmpstr(out, ==, "!\n{\"b\":2}\n");
}

static void test_too_deep(void)
{
    for (unsigned extra = 0; extra < 2; extra++) {
        g_autoptr(GString) text = g_string_new(NULL);
        for (unsigned i = 0; i < JSON_STREAM_MAX_DEPTH + extra; i++) {
            g_string_append_c(text, '[');
        }
        for (unsigned i = 0; i < JSON_STREAM_MAX_DEPTH + extra; i++) {
            g_string_append_c(text, ']');
        }
        g_autofree char *expected = g_strdup_printf("%s\n{}\n", extra ? "!" : text->str);
        g_string_append(text, "{}");
        g_autofree char *out = run(text->str, text->len, 100);
        g_assert_cmpstr(out, ==, expected);
    }
}

static void test_random(void)
{
    static const char alphabet[] = "{}[]\"'\\:, \n1tn\xff\xc3";
    for (unsigned round = 0; round < 3000; round++) {
        char text[40];
        for (unsigned i = 0; i < sizeof(text); i++) {
            text[i] = alphabet[g_test_rand_int_range(0, sizeof(alphabet))];
        }
        g_autofree char *whole = run(text, sizeof(text), sizeof(text));
        g_autofree char *bytes = run(text, sizeof(text), 1);
        g_assert_cmpstr(whole, ==, bytes);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/json-stream/cases", test_cases);
    g_test_add_func("/json-stream/zero-bytes", test_zero_bytes);
    g_test_add_func("/json-stream/too-long", test_too_long);
    g_test_add_func("/json-stream/too-deep", test_too_deep);
    g_test_add_func("/json-stream/random", test_random);
    return g_test_run();
}
