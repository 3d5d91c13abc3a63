/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A blocking QMP client (see client.h): connects, reads the greeting, negotiates, then sends one command at a time
 * and reads lines until its reply has come. QMP's framing here is one JSON object per line, which is what both
 * Interlock and its peer send.
 *
 * 1. Every received line is either the reply to the command under way or an event; events queue in order.
 * 2. After a transport error the client stays failed.
 */
#include "tool/client.h"
#include <errno.h>
#include <glib.h>
#include <netdb.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct client {
    int fd;
    GString *input;
    GQueue events; /* json_t */
    bool failed;
};

static int connect_unix(const char *path, struct error **err)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int fd;

    if (strlen(path) >= sizeof(name.sun_path)) {
        return error_set(err, -ENAMETOOLONG, "The socket path '%s' is too long", path);
    }
    g_strlcpy(name.sun_path, path, sizeof(name.sun_path));
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&name, sizeof(name)) < 0) {
        int code = -errno;

        if (fd >= 0) {
            close(fd);
        }
        error_set_errno(err, code, "Cannot connect to the monitor socket '%s'", path);
        error_hint(err, "Is the daemon running, with --monitor and a --chardev socket on that path?");
        return code;
    }
    return fd;
}

static int connect_inet(const char *host, const char *port, struct error **err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int status = getaddrinfo(host, port, &hints, &found);
    int fd = -1, code = -ECONNREFUSED;

    if (status) {
        return error_set(err, -EINVAL, "Cannot resolve '%s:%s': %s", host, port, gai_strerror(status));
    }
    for (struct addrinfo *at = found; at && fd < 0; at = at->ai_next) {
        fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
        if (fd >= 0 && connect(fd, at->ai_addr, at->ai_addrlen) < 0) {
            code = -errno;
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(found);
    return fd >= 0 ? fd : error_set_errno(err, code, "Cannot connect to the monitor at '%s:%s'", host, port);
}

/* Takes the next line out of the input; NULL when there is no whole one. */
static char *take_line(struct client *client)
{
    char *end = memchr(client->input->str, '\n', client->input->len);
    char *line;

    if (!end) {
        return NULL;
    }
    line = g_strndup(client->input->str, (gsize)(end - client->input->str));
    g_string_erase(client->input, 0, end - client->input->str + 1);
    return line;
}

/* Reads one message; NULL on time-out or, unless a reply is waited for (timeout_ms < 0), a signal (*ret_code 0), or on
 * failure (negative errno). */
static json_t *read_message(struct client *client, int timeout_ms, int *ret_code)
{
    *ret_code = 0;
    for (;;) {
        g_autofree char *line = take_line(client);
        struct pollfd ready = {.fd = client->fd, .events = POLLIN};
        char chunk[16384];
        ssize_t got;

        if (line) {
            json_t *message = line[strspn(line, " \r\t")] ? json_loads(line, 0, NULL) : NULL;

            if (message) {
                return message;
            }
            continue;
        }
        int polled = poll(&ready, 1, timeout_ms);

        if (polled == 0 || (polled < 0 && errno == EINTR && timeout_ms >= 0)) {
            return NULL;
        }
        if (polled < 0 && errno == EINTR) {
            continue;
        }
        got = read(client->fd, chunk, sizeof(chunk));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            client->failed = true;
            *ret_code = got < 0 ? -errno : -ECONNRESET;
            return NULL;
        }
        g_string_append_len(client->input, chunk, got);
    }
}

static int write_message(struct client *client, json_t *message)
{
    g_autofree char *text = NULL;
    char *dumped = json_dumps(message, JSON_COMPACT);
    size_t done = 0, size;

    text = g_strconcat(dumped, "\n", NULL);
    free(dumped);
    size = strlen(text);
    while (done < size) {
        ssize_t sent = send(client->fd, text + done, size - done, MSG_NOSIGNAL);

        if (sent < 0 && errno != EINTR) {
            client->failed = true;
            return -errno;
        }
        done += sent > 0 ? (size_t)sent : 0;
    }
    return 0;
}

static int client_greet(struct client *client, struct error **err)
{
    int code;
    auto_json greeting = read_message(client, 10000, &code);

    if (!json_object_get(greeting, "QMP")) {
        return error_set(err, code ? code : -EPROTO,
                         "The monitor did not greet: is that socket a QMP monitor, and is "
                         "no other client connected to it?");
    }
    return client_execute(client, "qmp_capabilities", NULL, NULL, err);
}

int client_connect(const char *address, struct client **ret, struct error **err)
{
    struct client *client;
    const char *colon;
    int fd;

    address = address ? address : g_getenv("INTERLOCK_QMP");
    if (!address || !*address) {
        return error_set(err, -EINVAL, "Which daemon? Give --qmp SOCKET, or set INTERLOCK_QMP to its monitor socket");
    }
    if (g_str_has_prefix(address, "unix:")) {
        address += strlen("unix:");
    }
    colon = strrchr(address, ':');
    if (colon && !strchr(address, '/')) {
        g_autofree char *host = g_strndup(address, (gsize)(colon - address));

        fd = connect_inet(host, colon + 1, err);
    } else {
        fd = connect_unix(address, err);
    }
    if (fd < 0) {
        return fd;
    }
    client = g_new0(struct client, 1);
    client->fd = fd;
    client->input = g_string_new(NULL);
    g_queue_init(&client->events);
    fd = client_greet(client, err);
    if (fd < 0) {
        client_close(client);
        return fd;
    }
    *ret = client;
    return 0;
}

void client_close(struct client *client)
{
    if (!client) {
        return;
    }
    close(client->fd);
    g_queue_clear_full(&client->events, (GDestroyNotify)json_decref);
    g_string_free(client->input, TRUE);
    g_free(client);
}

static int reply_to_error(json_t *reply, struct error **err)
{
    json_t *error = json_object_get(reply, "error");
    const char *text = json_string_value(json_object_get(error, "desc"));
    struct error *made = NULL;

    error_set(&made, -EIO, "%s", text ? text : "The daemon refused without a reason");
    made->data = json_incref(json_object_get(error, "data"));
    return error_move(err, made);
}

int client_execute(struct client *client, const char *command, json_t *arguments, json_t **ret, struct error **err)
{
    auto_json request = json_pack("{s:s}", "execute", command);
    int code;

    if (arguments) {
        json_object_set_new(request, "arguments", arguments);
    }
    code = client->failed ? -ECONNRESET : write_message(client, request);
    while (!code) {
        auto_json message = read_message(client, -1, &code);

        if (json_object_get(message, "event")) {
            g_queue_push_tail(&client->events, json_incref(message));
        } else if (json_object_get(message, "return")) {
            if (ret) {
                *ret = json_incref(json_object_get(message, "return"));
            }
            return 0;
        } else if (message) {
            return reply_to_error(message, err);
        }
    }
    return error_set_errno(err, code, "The daemon went away during %s", command);
}

json_t *client_wait_event(struct client *client, int timeout_ms, bool *ret_gone)
{
    int code = 0;
    json_t *message;

    *ret_gone = false;
    if (!g_queue_is_empty(&client->events)) {
        return g_queue_pop_head(&client->events);
    }
    message = client->failed ? NULL : read_message(client, timeout_ms, &code);
    *ret_gone = client->failed;
    if (message && !json_object_get(message, "event")) {
        json_decref(message);
        return NULL;
    }
    return message;
}

json_t *client_take_event(struct client *client, const char *name, const char *key, const char *value)
{
    for (GList *at = client->events.head; at; at = at->next) {
        json_t *event = at->data;

        if (!g_strcmp0(json_string_value(json_object_get(event, "event")), name) &&
            !g_strcmp0(json_string_value(json_object_get(json_object_get(event, "data"), key)), value)) {
            g_queue_delete_link(&client->events, at);
            return event;
        }
    }
    return NULL;
}

bool client_listen(struct client *client, int timeout_ms)
{
    int code = 0;
    json_t *message = client->failed ? NULL : read_message(client, timeout_ms, &code);

    if (json_object_get(message, "event")) {
        g_queue_push_tail(&client->events, message);
    } else {
        json_decref(message);
    }
    return !client->failed;
}

int client_knows(struct client *client, const char *command, bool *ret, struct error **err)
{
    auto_json commands = NULL;
    int code = client_execute(client, "query-commands", NULL, &commands, err);
    size_t index;
    json_t *known;

    *ret = false;
    json_array_foreach(commands, index, known)
    {
        *ret = *ret || !g_strcmp0(json_string_value(json_object_get(known, "name")), command);
    }
    return code;
}

bool client_is_local(const struct client *client)
{
    struct sockaddr_storage peer;
    socklen_t size = sizeof(peer);

    return getpeername(client->fd, (struct sockaddr *)&peer, &size) == 0 && peer.ss_family == AF_UNIX;
}

char *client_folder(const struct client *client)
{
    struct ucred who;
    socklen_t size = sizeof(who);

    if (!client_is_local(client) || getsockopt(client->fd, SOL_SOCKET, SO_PEERCRED, &who, &size) < 0) {
        return NULL;
    }
    g_autofree char *link = g_strdup_printf("/proc/%ld/cwd", (long)who.pid);

    return g_file_read_link(link, NULL);
}
