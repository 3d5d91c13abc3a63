/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BASE_LIST_H
#define INTERLOCK_BASE_LIST_H

#include <stdbool.h>
#include <stddef.h>

/* An intrusive, circular, doubly linked list. A head is a link that belongs to no element. Not thread-safe. */
struct list {
    struct list *next, *prev;
};

#define LIST_INIT(name)  \
    {                    \
        &(name), &(name) \
    }
#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))
#define list_for_each(position, head) \
    for (struct list *position = (head)->next; position != (head); position = position->next)
#define list_for_each_safe(position, head)                                                            \
    for (struct list *position = (head)->next, *position##_next = position->next; position != (head); \
         position = position##_next, position##_next = position->next)

static inline void list_init(struct list *head)
{
    head->next = head->prev = head;
}
static inline bool list_is_empty(const struct list *head)
{
    return head->next == head;
}
static inline void list_append(struct list *head, struct list *link)
{
    link->prev = head->prev;
    link->next = head;
    head->prev->next = link;
    head->prev = link;
}
static inline void list_prepend(struct list *head, struct list *link)
{
    list_append(head->next, link);
}
/* Takes a link out of its list and leaves it as an empty list, so a second remove does no harm. */
static inline void list_remove(struct list *link)
{
    link->prev->next = link->next;
    link->next->prev = link->prev;
    list_init(link);
}

#endif
