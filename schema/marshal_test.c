/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Tests of marshal.c through the generated faces: what is accepted, what is refused by which path, and round trips. */
#include "block/operation.h"
#include "schema/claims.h"
#include "schema/commands.h"
#include "schema/events.h"
#include "schema/introspection.h"
#include "schema/types.h"

#include <glib.h>
#include <string.h>

static json_t *parse(const char *text)
{
    json_error_t error;
    json_t *json = json_loads(text, JSON_DECODE_ANY, &error);
    if (!json) {
        g_error("test input: %s in %s", error.text, text);
    }
    return json;
}

static struct blockdev_options *read_options(const char *text)
{
    json_t *json = parse(text);
    auto_error error = NULL;
    struct blockdev_options *options = NULL;
    int result = blockdev_options_from_json(json, NULL, &options, &error);
    json_decref(json);
    g_assert_cmpstr(error ? error->message : NULL, ==, NULL);
    g_assert_cmpint(result, ==, 0);
    return options;
}

static void test_union(void)
{
    struct blockdev_options *options = read_options(
        "{\"driver\":\"qcow2\",\"node-name\":\"n\",\"cache\":{\"direct\":true},\"file\":{\"driver\":\"file\","
        "\"filename\":"
        "\"x\"},\"backing\":null,\"l2-cache-size\":1048576,\"overlap-check\":\"all\",\"lazy-refcounts\":false}");
    g_assert_cmpint(options->driver, ==, BLOCKDEV_DRIVER_QCOW2);
    g_assert_cmpstr(options->node_name, ==, "n");
    g_assert_false(options->has_read_only);
    g_assert_false(options->read_only);
    g_assert_cmpint(options->discard, ==, BLOCKDEV_DISCARD_OPTIONS_IGNORE);
    g_assert_true(options->cache->has_direct && options->cache->direct && !options->cache->has_no_flush);
    struct blockdev_options_qcow2 *qcow2 = &options->u.qcow2;
    g_assert_cmpint(qcow2->file->kind, ==, BLOCKDEV_REF_DEFINITION);
    g_assert_cmpstr(qcow2->file->u.definition->u.file.filename, ==, "x");
    g_assert_cmpint(qcow2->backing->kind, ==, BLOCKDEV_REF_OR_NULL_NULL);
    g_assert_true(qcow2->has_l2_cache_size && qcow2->l2_cache_size == 1048576);
    g_assert_true(qcow2->has_lazy_refcounts && !qcow2->lazy_refcounts);
    g_assert_true(!qcow2->has_pass_discard_snapshot && qcow2->pass_discard_snapshot);
    g_assert_cmpint(qcow2->overlap_check->kind, ==, QCOW2_OVERLAP_CHECKS_MODE);
    g_assert_cmpint(qcow2->overlap_check->u.mode, ==, QCOW2_OVERLAP_CHECK_MODE_ALL);
    blockdev_options_free(options);
}

static void test_round_trip(void)
{
    static const char *const texts[] = {
        "{\"driver\":\"file\",\"filename\":\"/a\",\"locking\":\"off\",\"aio\":\"io_uring\"}",
        "{\"driver\":\"raw\",\"file\":\"node\",\"offset\":512,\"size\":9223372036854775807}",
        "{\"driver\":\"qcow2\",\"file\":\"f\",\"backing\":{\"driver\":\"qcow2\",\"file\":\"g\",\"backing\":\"h\"}}",
        "{\"driver\":\"qcow2\",\"file\":\"f\",\"overlap-check\":{\"template\":\"none\",\"main-header\":true}}",
        "{\"driver\":\"null-co\",\"size\":0}",
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(texts); i++) {
        json_t *in = parse(texts[i]);
        struct blockdev_options *options = read_options(texts[i]);
        struct blockdev_options *copy = blockdev_options_copy(options);
        blockdev_options_free(options);
        json_t *out = blockdev_options_to_json(copy);
        blockdev_options_free(copy);
        g_assert_true(json_equal(in, out));
        json_decref(in);
        json_decref(out);
    }
    g_assert_null(blockdev_options_copy(NULL));
    blockdev_options_free(NULL);
}

static void test_refusals(void)
{
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"12", "arguments: expected an object"},
        {"{}", "driver: is required"},
        {"{\"driver\":\"qed\"}", "driver: 'qed' is not one of file, ..."},
        {"{\"driver\":7}", "driver: expected one of file, ..."},
        {"{\"driver\":\"file\"}", "filename: is required"},
        {"{\"driver\":\"file\",\"filename\":1}", "filename: expected a string"},
        {"{\"driver\":\"file\",\"filename\":\"x\",\"backing\":\"y\"}", "backing: there is no such parameter here"},
        {"{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"x\",\"bogus\":1}}",
         "file.bogus: there is no such parameter here"},
        {"{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\"}}", "file.filename: is required"},
        {"{\"driver\":\"qcow2\",\"file\":null}", "file: expected an object or a string"},
        {"{\"driver\":\"qcow2\",\"file\":\"f\",\"backing\":5}", "backing: expected an object or a string or null"},
        {"{\"driver\":\"null-co\",\"size\":-1}", "size: -1 is less than 0"},
        {"{\"driver\":\"null-co\",\"size\":\"10k\"}", "size: expected an integer"},
        {"{\"driver\":\"null-co\",\"size\":1.5}", "size: expected an integer"},
        {"{\"driver\":\"null-co\",\"read-zeroes\":\"on\"}", "read-zeroes: expected true or false"},
        {"{\"driver\":\"null-co\",\"cache\":[]}", "cache: expected an object"},
        {"{\"driver\":\"qcow2\",\"file\":\"f\",\"cache-clean-interval\":4294967296}",
         "cache-clean-interval: 4294967296 is not between 0 and 4294967295"},
        {"{\"driver\":\"qcow2\",\"file\":\"f\",\"overlap-check\":{\"main-header\":1}}",
         "overlap-check.main-header: expected true or false"},
        {"{\"driver\":\"qcow2\",\"file\":\"f\",\"overlap-check\":\"some\"}",
         "overlap-check: 'some' is not one of none, constant, cached, all"},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        json_t *json = parse(cases[i].text);
        auto_error error = NULL;
        struct blockdev_options *options = (void *)&options;
        g_assert_cmpint(blockdev_options_from_json(json, NULL, &options, &error), <, 0);
        if (g_str_has_suffix(cases[i].message, "...")) {
            g_autofree char *begin = g_strndup(cases[i].message, strlen(cases[i].message) - 3);
            g_assert_true(g_str_has_prefix(error->message, begin));
        } else {
            g_assert_cmpstr(error->message, ==, cases[i].message);
        }
        g_assert_true(options == (void *)&options);
        json_decref(json);
    }
}

static void test_text_mode(void)
{
    json_t *json =
        parse("{\"driver\":\"raw\",\"file\":{\"driver\":\"null-co\",\"size\":\"1.5G\",\"read-zeroes\":\"on\","
              "\"latency-ns\":\"5\"},\"read-only\":\"yes\",\"offset\":\"64k\"}");
    auto_error error = NULL;
    struct blockdev_options *options;
    g_assert_cmpint(blockdev_options_from_text(json, "--blockdev", &options, &error), ==, 0);
    g_assert_true(options->read_only);
    g_assert_cmpuint(options->u.raw.offset, ==, 65536);
    struct blockdev_options_null_co *null_co = &options->u.raw.file->u.definition->u.null_co;
    g_assert_cmpuint(null_co->size, ==, 1610612736);
    g_assert_true(null_co->read_zeroes);
    g_assert_cmpint(null_co->latency_ns, ==, 5);
    blockdev_options_free(options);

    json_object_set_new(json_object_get(json, "file"), "latency-ns", json_string("5x"));
    g_assert_cmpint(blockdev_options_from_text(json, "--blockdev", &options, &error), <, 0);
    g_assert_cmpstr(error->message, ==, "--blockdev.file.latency-ns: '5x' is not an integer");
    json_decref(json);
}

/* An alternate with a list among its choices. */
static void test_list_or_one(void)
{
    static const char *const texts[] = {"\"a\"", "[\"a\",\"b\"]", "[]"};
    static const char *const wrong[][2] = {{"1", "iothread: expected a string or a list"},
                                           {"[\"a\",2]", "iothread[1]: expected a string"}};
    const char *frame = "{\"type\":\"nbd\",\"id\":\"e\",\"node-name\":\"n\",\"iothread\":%s}";

    for (unsigned i = 0; i < G_N_ELEMENTS(texts); i++) {
        g_autofree char *text = g_strdup_printf(frame, texts[i]);
        json_t *in = parse(text), *wanted = json_loads(texts[i], JSON_DECODE_ANY, NULL);
        struct block_export_options *options;
        g_assert_cmpint(block_export_options_from_json(in, NULL, &options, NULL), ==, 0);
        struct block_export_options *copy = block_export_options_copy(options);
        block_export_options_free(options);
        json_t *out = block_export_options_to_json(copy);
        g_assert_true(json_equal(json_object_get(out, "iothread"), wanted));
        block_export_options_free(copy);
        json_decref(in);
        json_decref(out);
        json_decref(wanted);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(wrong); i++) {
        g_autofree char *text = g_strdup_printf(frame, wrong[i][0]);
        json_t *in = parse(text);
        auto_error error = NULL;
        struct block_export_options *options;
        g_assert_cmpint(block_export_options_from_json(in, NULL, &options, &error), <, 0);
        g_assert_cmpstr(error->message, ==, wrong[i][1]);
        json_decref(in);
    }
}

static void test_lists(void)
{
    struct access_info *info = g_new0(struct access_info, 1);
    struct access_holder_info *holder = g_new0(struct access_holder_info, 1);
    struct access_claim_info *claim = g_new0(struct access_claim_info, 1);
    claim->node = g_strdup("a");
    claim->path = g_strdup("top");
    for (unsigned i = 0; i < NODE_ACTION_COUNT; i++) {
        node_action_list_append(&claim->require, (enum node_action)i);
    }
    holder->id = g_strdup("j");
    holder->kind = g_strdup("job");
    holder->command = g_strdup("block-commit");
    holder->state = g_strdup("running \xff");
    holder->since = 1.5;
    access_claim_info_list_append(&holder->claims, claim);
    access_holder_info_list_append(&info->holders, holder);
    for (unsigned i = 0; i < 5; i++) {
        struct stale_node_info *stale = g_new0(struct stale_node_info, 1);
        stale->node = g_strdup("b");
        stale->reason = g_strdup("committed");
        stale_node_info_list_append(&info->stale, stale);
    }
    json_t *json = access_info_to_json(info);
    access_info_free(info);
    auto_error error = NULL;
    struct access_info *again = NULL;
    g_assert_cmpint(access_info_from_json(json, NULL, &again, &error), ==, 0);
    g_assert_cmpuint(again->stale.count, ==, 5);
    g_assert_cmpuint(again->holders.items[0]->claims.items[0]->require.count, ==, NODE_ACTION_COUNT);
    g_assert_cmpstr(again->holders.items[0]->state, ==, "running \xef\xbf\xbd");
    access_info_free(again);

    json_array_append_new(json_object_get(json, "stale"), json_integer(1));
    g_assert_cmpint(access_info_from_json(json, NULL, &again, &error), <, 0);
    g_assert_cmpstr(error->message, ==, "stale[5]: expected an object");
    json_decref(json);
}

static void test_events(void)
{
    json_t *event = event_job_status_change("j", JOB_STATUS_RUNNING);
    json_t *expected = parse("{\"event\":\"JOB_STATUS_CHANGE\",\"data\":{\"id\":\"j\",\"status\":\"running\"}}");
    g_assert_true(json_equal(event, expected));
    json_decref(event);
    json_decref(expected);
    event = event_block_image_corrupted("", NULL, "bad", false, 0, true, 7, true);
    expected = parse("{\"event\":\"BLOCK_IMAGE_CORRUPTED\",\"data\":{\"device\":\"\",\"msg\":\"bad\",\"size\":7,"
                     "\"fatal\":true}}");
    g_assert_true(json_equal(event, expected));
    json_decref(event);
    json_decref(expected);
}

static void test_arguments(void)
{
    json_t *json = parse("{\"device\":\"top\",\"speed\":-1}");
    auto_error error = NULL;
    struct block_commit_args *args;
    g_assert_cmpint(block_commit_args_from_json(json, NULL, &args, &error), <, 0);
    g_assert_cmpstr(error->message, ==, "speed: -1 is less than 0");
    json_object_del(json, "speed");
    g_assert_cmpint(block_commit_args_from_json(json, NULL, &args, NULL), ==, 0);
    g_assert_true(args->auto_dismiss && !args->has_auto_dismiss && !args->base_node);
    block_commit_args_free(args);
    json_decref(json);
}

static void test_enums(void)
{
    enum job_status status;
    auto_error error = NULL;
    for (unsigned i = 0; i < JOB_STATUS_COUNT; i++) {
        g_assert_cmpint(job_status_parse(job_status_name((enum job_status)i), &status, NULL), ==, 0);
        g_assert_cmpint(status, ==, i);
    }
    g_assert_cmpint(job_status_parse("Running", &status, &error), <, 0);
}

static void test_claims(void)
{
    g_assert_cmpstr(block_commit_claims.operation, ==, "block-commit");
    g_assert_cmpint(block_commit_claims.adopt, ==, CLAIM_ADOPT_CHAIN);
    bool found = false;
    for (unsigned i = 0; i < block_commit_claims.count; i++) {
        const struct claim_clause *clause = &block_commit_claims.clauses[i];
        if (clause->unless == CLAIM_IF_ACTIVE) {
            g_assert_cmpint(clause->first, ==, CLAIM_TOP);
            g_assert_cmphex(clause->deny, ==, ACCESS_WRITE_DATA);
            found = true;
        }
    }
    g_assert_true(found);
    g_assert_true(block_stream_claims.sources);
}

static void test_introspection(void)
{
    json_t *schema = parse(schema_introspection);
    g_autoptr(GHashTable) types = g_hash_table_new(g_str_hash, g_str_equal);
    size_t i;
    json_t *entry;
    json_array_foreach(schema, i, entry)
    {
        g_assert_true(g_hash_table_add(types, (char *)json_string_value(json_object_get(entry, "name"))));
    }
    json_array_foreach(schema, i, entry)
    {
        static const char *const references[] = {"arg-type", "ret-type", "element-type"};
        for (unsigned r = 0; r < G_N_ELEMENTS(references); r++) {
            json_t *name = json_object_get(entry, references[r]);
            g_assert_true(!name || g_hash_table_contains(types, json_string_value(name)));
        }
    }
    g_assert_true(g_hash_table_contains(types, "block-commit") && g_hash_table_contains(types, "SHUTDOWN"));
    json_decref(schema);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/marshal/union", test_union);
    g_test_add_func("/marshal/list-or-one", test_list_or_one);
    g_test_add_func("/marshal/round-trip", test_round_trip);
    g_test_add_func("/marshal/refusals", test_refusals);
    g_test_add_func("/marshal/text-mode", test_text_mode);
    g_test_add_func("/marshal/lists", test_lists);
    g_test_add_func("/marshal/events", test_events);
    g_test_add_func("/marshal/arguments", test_arguments);
    g_test_add_func("/marshal/enums", test_enums);
    g_test_add_func("/marshal/claims", test_claims);
    g_test_add_func("/marshal/introspection", test_introspection);
    return g_test_run();
}
