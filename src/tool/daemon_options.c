/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The daemon's command line (see daemon_options.h). Settings are read at once; everything that acts is a step, kept
 * with its text and carried out later, in order, on the control loop, by the handler of the QMP command that it
 * stands for. A --chardev only describes an end point; the --monitor that names it opens it. The table of steps is the
 * list of options that act. Parsing needs no loop; running a step does.
 */
#include "tool/daemon_options.h"
#include "control/control.h"
#include "control/monitor.h"
#include "export/address.h"
#include "export/export.h"
#include "loop/connection.h"
#include "schema/commands.h"
#include "tool/keyval.h"
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct chardev {
    bool stdio, wait;
    struct address address;
    bool used;
};

/* A kind of step: the option, the key that its first value may go without, and what it does. */
struct step_kind {
    const char *option, *implied;
    int coroutine_fn (*run)(json_t *arguments, bool text, const struct daemon_options *options, struct control *control,
                            struct error **err);
};

struct daemon_step {
    const struct step_kind *kind;
    char *text;
};

static void chardev_free(void *pointer)
{
    struct chardev *chardev = pointer;

    address_clear(&chardev->address);
    g_free(chardev);
}

/* Reads arguments by the type's reader for JSON or for text. */
#define read_as(type, arguments, text, ret, err) \
    ((text) ? type##_from_text(arguments, NULL, ret, err) : type##_from_json(arguments, NULL, ret, err))

static int coroutine_fn step_blockdev(json_t *arguments, bool text, const struct daemon_options *options,
                                      struct control *control, struct error **err)
{
    struct blockdev_options *blockdev;
    int code = read_as(blockdev_options, arguments, text, &blockdev, err);

    if (!code) {
        code = command_blockdev_add(control, blockdev, err);
        blockdev_options_free(blockdev);
    }
    return code;
}

static int coroutine_fn step_export(json_t *arguments, bool text, const struct daemon_options *options,
                                    struct control *control, struct error **err)
{
    struct block_export_options *export;
    int code = read_as(block_export_options, arguments, text, &export, err);

    if (!code) {
        code = command_block_export_add(control, export, err);
        block_export_options_free(export);
    }
    return code;
}

static int coroutine_fn step_object(json_t *arguments, bool text, const struct daemon_options *options,
                                    struct control *control, struct error **err)
{
    struct object_options *object;
    int code = read_as(object_options, arguments, text, &object, err);

    if (!code) {
        code = command_object_add(control, object, err);
        object_options_free(object);
    }
    return code;
}

static int coroutine_fn step_nbd_server(json_t *arguments, bool text, const struct daemon_options *options,
                                        struct control *control, struct error **err)
{
    struct nbd_server_options *server;
    struct address address;
    int code = read_as(nbd_server_options, arguments, text, &server, err);

    if (code) {
        return code;
    }
    code = address_from_options(server->addr, &address, err);
    if (!code) {
        struct nbd_server_config config = {.address = &address,
                                           .handshake_max_seconds = (unsigned)server->handshake_max_seconds,
                                           .max_connections = (unsigned)server->max_connections,
                                           .tls_credentials = server->tls_creds,
                                           .tls_authorization = server->tls_authz,
                                           .held = address.kind == ADDRESS_FD};

        code = nbd_server_start(control->exports, &config, err);
        address_clear(&address);
    }
    nbd_server_options_free(server);
    return code;
}

static const char *text_value(json_t *arguments, const char *key)
{
    return json_string_value(json_object_get(arguments, key));
}

static bool is_on(const char *value)
{
    return value && (!strcmp(value, "on") || !strcmp(value, "yes") || !strcmp(value, "true"));
}

static int chardev_check_keys(json_t *arguments, struct error **err)
{
    static const char *const known[] = {"backend", "id",     "path", "abstract", "host",
                                        "port",    "server", "wait", "signal",   "fd"};
    const char *key;
    json_t *value;

    json_object_foreach(arguments, key, value)
    {
        bool found = false;

        for (unsigned i = 0; i < G_N_ELEMENTS(known); i++) {
            found = found || !strcmp(key, known[i]);
        }
        if (!found) {
            return error_set(err, -EINVAL, "The chardev parameter '%s' is not known", key);
        }
    }
    return 0;
}

static int chardev_socket(json_t *arguments, struct chardev *chardev, struct error **err)
{
    const char *path = text_value(arguments, "path");
    const char *host = text_value(arguments, "host");
    const char *port = text_value(arguments, "port");
    const char *fd = text_value(arguments, "fd");

    if (!is_on(text_value(arguments, "server"))) {
        return error_set(err, -EINVAL, "A chardev socket for a monitor needs server=on: Interlock does not dial out");
    }
    chardev->wait = is_on(text_value(arguments, "wait")) || !text_value(arguments, "wait");
    if (fd && !path && !host && !port) {
        struct socket_address inherited = {.type = SOCKET_ADDRESS_TYPE_FD, .u.fd.str = (char *)fd};

        return address_from_options(&inherited, &chardev->address, err);
    }
    if (fd) {
        return error_set(err, -EINVAL, "A chardev socket has a descriptor, or a path, or a port");
    }
    if (path && !host && !port) {
        chardev->address = (struct address){.kind = ADDRESS_UNIX,
                                            .path = g_strdup(path),
                                            .abstract = is_on(text_value(arguments, "abstract")),
                                            .fd = -1};
    } else if (port && !path) {
        chardev->address = (struct address){
            .kind = ADDRESS_INET, .host = g_strdup(host ? host : ""), .port = g_strdup(port), .fd = -1};
    } else {
        return error_set(err, -EINVAL, "A chardev socket needs a path, or a host and a port, or a descriptor");
    }
    return 0;
}

static int coroutine_fn step_chardev(json_t *arguments, bool text, const struct daemon_options *options,
                                     struct control *control, struct error **err)
{
    const char *backend = text_value(arguments, "backend"), *id = text_value(arguments, "id");
    struct chardev *chardev;
    int code = chardev_check_keys(arguments, err);

    if (code) {
        return code;
    }
    if (!id || !backend) {
        return error_set(err, -EINVAL, "A chardev needs a backend and an id");
    }
    if (g_hash_table_contains(options->chardevs, id)) {
        return error_set(err, -EEXIST, "There is a chardev '%s' already", id);
    }
    chardev = g_new0(struct chardev, 1);
    chardev->address.fd = -1;
    if (!strcmp(backend, "stdio")) {
        chardev->stdio = true;
    } else if (!strcmp(backend, "socket")) {
        code = chardev_socket(arguments, chardev, err);
    } else {
        code = error_set(err, -EINVAL, "There is no chardev backend '%s' here; there are socket and stdio", backend);
    }
    if (code) {
        chardev_free(chardev);
        return code;
    }
    g_hash_table_insert(options->chardevs, g_strdup(id), chardev);
    return 0;
}

static int coroutine_fn step_monitor(json_t *arguments, bool text, const struct daemon_options *options,
                                     struct control *control, struct error **err)
{
    const char *id = text_value(arguments, "chardev"), *mode = text_value(arguments, "mode");
    struct monitor_config config = {.pretty = is_on(text_value(arguments, "pretty"))};
    struct chardev *chardev = id ? g_hash_table_lookup(options->chardevs, id) : NULL;
    struct monitor *monitor;
    int code;

    if (!chardev) {
        return error_set(err, -ENOENT, "There is no chardev '%s'; give --chardev before --monitor", id ? id : "");
    }
    if (mode && strcmp(mode, "control")) {
        return error_set(err, -EINVAL, "A monitor's mode is 'control', not '%s'", mode);
    }
    if (chardev->used) {
        return error_set(err, -EBUSY, "The chardev '%s' has a monitor already", id);
    }
    chardev->used = true;
    config.id = id;
    if (chardev->stdio) {
        config.connection = connection_from_fds(STDIN_FILENO, STDOUT_FILENO);
    } else {
        config.address = &chardev->address;
    }
    code = monitor_open(control, &config, &monitor, err);
    if (!code && chardev->wait) {
        monitor_wait_client(monitor);
    }
    return code;
}

static const struct step_kind step_kinds[] = {
    {"blockdev", "driver", step_blockdev}, {"export", "type", step_export},      {"object", "qom-type", step_object},
    {"nbd-server", NULL, step_nbd_server}, {"chardev", "backend", step_chardev}, {"monitor", "chardev", step_monitor},
};

int coroutine_fn daemon_step_run(const struct daemon_step *step, const struct daemon_options *options,
                                 struct control *control, struct error **err)
{
    json_t *arguments;
    bool text;
    int code = keyval_parse(step->text, step->kind->implied, &arguments, &text, err);

    if (!code) {
        code = step->kind->run(arguments, text, options, control, err);
        json_decref(arguments);
    }
    if (code) {
        error_prepend(err, "--%s %s", step->kind->option, step->text);
    }
    return code;
}

/* "server" and "wait" may stand alone in a --chardev: they mean on; "nowait" means wait=off. */
static char *chardev_normalise(const char *text)
{
    g_auto(GStrv) items = g_strsplit(text, ",", -1);

    for (unsigned i = 0; *text != '{' && items[i]; i++) {
        const char *full = !strcmp(items[i], "server")   ? "server=on"
                           : !strcmp(items[i], "wait")   ? "wait=on"
                           : !strcmp(items[i], "nowait") ? "wait=off"
                                                         : NULL;

        if (full) {
            g_free(items[i]);
            items[i] = g_strdup(full);
        }
    }
    return g_strjoinv(",", items);
}

static void print_help(void)
{
    printf("Usage: interlock daemon [OPTION...]\n\n"
           "Opens disk images as a graph of nodes, serves them, and runs live operations on them. Options are carried "
           "out in\nthe order in which they stand; each takes KEY=VALUE,... or JSON.\n\n"
           "  -h, --help              show this and exit\n"
           "  -V, --version           show the version and exit\n"
           "  --blockdev [driver=]qcow2|raw|file|null-co,node-name=N[,read-only=on][,cache.direct=on]...\n"
           "                          open a node, as blockdev-add\n"
           "  --chardev socket,id=C,path=PATH,server=on,wait=off | socket,id=C,host=H,port=P,server=on,wait=off | "
           "stdio,id=C |\n            socket,id=C,fd=F,server=on,wait=off\n"
           "                          describe the end point of a monitor\n"
           "  --monitor [chardev=]C   a QMP monitor there\n"
           "  --nbd-server addr.type=unix,addr.path=PATH | addr.type=inet,addr.host=H,addr.port=P[,max-connections=N]\n"
           "                [,tls-creds=ID[,tls-authz=ID]] | addr.type=fd,addr.str=F\n"
           "                          start the NBD server; F: the number of a listening socket, or its name in "
           "LISTEN_FDNAMES\n"
           "  --export [type=]nbd,id=E,node-name=N[,name=NAME][,writable=on][,iothread=T | "
           ",iothread.0=T,iothread.1=U...]\n"
           "                          serve a node to NBD clients\n"
           "  --object [qom-type=]iothread,id=T\n"
           "                          make an I/O thread\n"
           "  --object secret,id=S,data=TEXT|file=PATH[,format=base64]\n"
           "                          give a passphrase or a key, for the options that name one by its id\n"
           "  --object tls-creds-x509|tls-creds-psk,id=T,endpoint=server,dir=FOLDER | "
           "tls-creds-anon,id=T,endpoint=server\n"
           "                          give certificates or keys for TLS\n"
           "  --object authz-simple,id=A,identity=NAME | authz-list,id=A,rules.0.match=NAME,rules.0.policy=allow,...\n"
           "                          say whom TLS lets in\n"
           "  --daemonize             go into the background once everything is set up\n"
           "  --pidfile PATH          write the process number there\n"
           "  --engine auto|uring|epoll\n"
           "                          how to do I/O (default: auto, io_uring where the kernel allows it)\n"
           "  --allow-override        let commands pass that are refused, if they say why (\"override\"); data may be "
           "lost\n\n"
           "doc/reference.md has the commands that a monitor takes.\n");
}

static void step_free(void *pointer)
{
    struct daemon_step *step = pointer;

    g_free(step->text);
    g_free(step);
}

void daemon_options_free(struct daemon_options *options)
{
    if (options) {
        g_ptr_array_unref(options->steps);
        g_hash_table_unref(options->chardevs);
        g_free(options->pidfile);
        g_free(options);
    }
}

static void add_step(struct daemon_options *options, const char *name, const char *text)
{
    struct daemon_step *step = g_new0(struct daemon_step, 1);

    for (unsigned i = 0; i < G_N_ELEMENTS(step_kinds); i++) {
        if (!strcmp(step_kinds[i].option, name)) {
            step->kind = &step_kinds[i];
        }
    }
    step->text = step->kind->run == step_chardev ? chardev_normalise(text) : g_strdup(text);
    g_ptr_array_add(options->steps, step);
}

int daemon_options_parse(int argc, char **argv, struct daemon_options **ret, bool *ret_done, struct error **err)
{
    static const struct option names[] = {{"help", no_argument, NULL, 'h'},
                                          {"version", no_argument, NULL, 'V'},
                                          {"blockdev", required_argument, NULL, 's'},
                                          {"export", required_argument, NULL, 's'},
                                          {"object", required_argument, NULL, 's'},
                                          {"nbd-server", required_argument, NULL, 's'},
                                          {"chardev", required_argument, NULL, 's'},
                                          {"monitor", required_argument, NULL, 's'},
                                          {"daemonize", no_argument, NULL, 'd'},
                                          {"pidfile", required_argument, NULL, 'p'},
                                          {"engine", required_argument, NULL, 'e'},
                                          {"allow-override", no_argument, NULL, 'o'},
                                          {NULL, 0, NULL, 0}};
    struct daemon_options *options = g_new0(struct daemon_options, 1);
    int code = 0, index, option;

    options->steps = g_ptr_array_new_with_free_func(step_free);
    options->chardevs = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, chardev_free);
    optind = 0;
    while (!code && !*ret_done && (option = getopt_long(argc, argv, "hV", names, &index)) >= 0) {
        switch (option) {
        case 'h':
            print_help();
            *ret_done = true;
            break;
        case 'V':
            printf("interlock daemon version %s\n", INTERLOCK_VERSION);
            *ret_done = true;
            break;
        case 's':
            add_step(options, names[index].name, optarg);
            break;
        case 'd':
            options->daemonize = true;
            break;
        case 'p':
            g_free(options->pidfile);
            options->pidfile = g_strdup(optarg);
            break;
        case 'o':
            options->allow_override = true;
            break;
        case 'e':
            code = engine_parse(optarg, &options->engine, err);
            break;
        default:
            code = error_set(err, -EINVAL, "See 'interlock daemon --help'");
        }
    }
    if (!code && !*ret_done && optind < argc) {
        code = error_set(err, -EINVAL, "Unexpected argument '%s'", argv[optind]);
    }
    if (code || *ret_done) {
        daemon_options_free(options);
        return code;
    }
    *ret = options;
    return 0;
}
