/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which instances an operation has in a graph, and in which relation two of them stand. */
#include "loop/loop.h"
#include "tool/instance.h"
#include "tool/shape.h"

struct bed {
    const struct shape *shape;
    struct graph *graph;
    struct node *nodes[8 + SHAPE_SPARES];
    GPtrArray *variants, *instances;
};

static void coroutine_fn bed_open(struct bed *bed, const char *name)
{
    for (unsigned i = 0; i < shape_count; i++) {
        if (g_str_equal(shapes[i].name, name)) {
            bed->shape = &shapes[i];
        }
    }
    bed->graph = shape_open(bed->shape, bed->nodes);
    g_assert_cmpint(variants_make(&bed->variants, NULL), ==, 0);
    bed->instances = instances_make(bed->variants, bed->nodes, shape_size(bed->shape));
}

static void coroutine_fn bed_close(struct bed *bed)
{
    g_ptr_array_unref(bed->instances);
    g_ptr_array_unref(bed->variants);
    shape_close(bed->graph, bed->shape, bed->nodes);
}

static const struct instance *find(const struct bed *bed, const char *text)
{
    for (unsigned i = 0; i < bed->instances->len; i++) {
        const struct instance *instance = bed->instances->pdata[i];
        if (g_str_equal(instance->text, text)) {
            return instance;
        }
    }
    return NULL;
}

static void coroutine_fn instances_body(void *argument)
{
    static const char *const present[] = {"commit a>base",  "commit top>base", "stream c..a",
                                          "stream a..none", "export-ro-sh a",  "export-rw top",
                                          "resize base",    "shrink top",      "cbf a"};
    static const char *const absent[] = {"commit a>b", "commit a>a", "stream b..a..", "stream base..none", "cbf base"};
    struct bed bed;

    bed_open(&bed, "chain");
    for (unsigned i = 0; i < G_N_ELEMENTS(present); i++) {
        g_assert_nonnull(find(&bed, present[i]));
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(absent); i++) {
        g_assert_null(find(&bed, absent[i]));
    }
    g_assert_true(find(&bed, "commit top>base")->variant->conditions & CLAIM_IF_ACTIVE);
    g_assert_false(find(&bed, "commit a>base")->variant->conditions & CLAIM_IF_ACTIVE);
    g_assert_null(find(&bed, "stream a..none")->low);
    bed_close(&bed);
}

static void coroutine_fn relations_body(void *argument)
{
    static const struct {
        const char *first, *second, *words;
    } rows[] = {
        {"commit n5>n3", "commit n2>n0", "A above B"},
        {"commit n2>n0", "commit n5>n3", "B above A"},
        {"commit n5>n3", "commit n3>n0", "A's base is B's top"},
        {"commit n3>n0", "commit n5>n3", "B's base is A's top"},
        {"commit n5>n2", "commit n3>n0", "A reaches into B from above"},
        {"commit n3>n0", "commit n5>n2", "B reaches into A from above"},
        {"commit n5>n0", "commit n3>n0", "same base, A's top is higher"},
        {"commit n3>n0", "commit n5>n0", "same base, B's top is higher"},
        {"commit n5>n0", "commit n3>n1", "B inside A"},
        {"commit n3>n1", "commit n5>n0", "A inside B"},
        {"commit n5>n0", "commit n5>n1", "same top, A's base is lower"},
        {"commit n5>n1", "commit n5>n0", "same top, B's base is lower"},
        {"commit n5>n1", "commit n5>n1", "same top, same base"},
        {"commit n5>n1", "stream n3..none", "A reaches into B from above"},
        {"commit n5>n0", "stream n5..none", "same top, B's base is lower"},
        {"stream n5..none", "stream n3..none", "same base, A's top is higher"},
        {"commit n5>n1", "resize n6", "B above A"},
        {"commit n5>n1", "resize n5", "B is A's top"},
        {"commit n5>n1", "resize n3", "B between A's top and base"},
        {"commit n5>n1", "resize n1", "B is A's base"},
        {"commit n5>n1", "resize n0", "B below A"},
        {"resize n5", "resize n1", "A above B"},
        {"resize n1", "resize n5", "B above A"},
        {"resize n1", "cbf n1", "same node"},
    };
    struct bed bed;

    bed_open(&bed, "tower");
    for (unsigned i = 0; i < G_N_ELEMENTS(rows); i++) {
        const struct instance *first = find(&bed, rows[i].first), *second = find(&bed, rows[i].second);
        g_assert_cmpstr(relation_find(first, second)->words, ==, rows[i].words);
    }
    g_autofree char *near = relation_neighbours(find(&bed, "commit n5>n3"), find(&bed, "commit n2>n0"));
    g_autofree char *far = relation_neighbours(find(&bed, "commit n5>n3"), find(&bed, "commit n1>n0"));
    g_assert_cmpstr(near, ==, "A's base leans on B's top");
    g_assert_cmpstr(far, ==, "");
    bed_close(&bed);
}

static void coroutine_fn branches_body(void *argument)
{
    struct bed bed;

    bed_open(&bed, "crown");
    g_assert_cmpstr(relation_find(find(&bed, "commit l2>l1"), find(&bed, "commit r2>r1"))->words, ==,
                    "different branches");
    g_assert_cmpstr(relation_find(find(&bed, "stream l2..none"), find(&bed, "resize r1"))->words, ==,
                    "B on another branch");
    g_assert_cmpstr(relation_find(find(&bed, "resize l1"), find(&bed, "resize r2"))->words, ==, "different branches");
    g_assert_cmpstr(instance_place(find(&bed, "commit l1>m")), ==, "an image of another branch leans on its base");
    g_assert_cmpstr(instance_place(find(&bed, "commit l1>base")), ==,
                    "an image of another branch leans on one between");
    g_assert_cmpstr(instance_place(find(&bed, "commit m>base")), ==, "no other branch leans on its base, or between");
    bed_close(&bed);
}

static void in_coroutine(const void *body)
{
    struct loop *loop;

    g_assert_cmpint(loop_create(ENGINE_AUTO, &loop, NULL), ==, 0);
    loop_run_coroutine(loop, (void (*)(void *))body, NULL);
    loop_destroy(loop);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_data_func("/instance/of-each-operation", instances_body, in_coroutine);
    g_test_add_data_func("/instance/relations", relations_body, in_coroutine);
    g_test_add_data_func("/instance/branches", branches_body, in_coroutine);
    return g_test_run();
}
