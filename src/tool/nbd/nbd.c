/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The options of `interlock nbd`: what they are called, which go together, and what is refused. Everything is checked
 * here before anything is opened; what an image or an address is found to be wrong with is serve.c's and list.c's.
 *
 * Refused by name: what needs the kernel's NBD client (--connect, --disconnect), tracing, SELinux labels.
 */
#include "tool/nbd/nbd.h"
#include "loop/activation.h"
#include "tool/tool.h"
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHARED_MAX 1000000

enum long_option {
    OPTION_CACHE = 256,
    OPTION_AIO,
    OPTION_DISCARD,
    OPTION_DETECT_ZEROES,
    OPTION_IMAGE_OPTS,
    OPTION_OBJECT,
    OPTION_FORK,
    OPTION_PID_FILE,
    OPTION_HANDSHAKE_LIMIT,
    OPTION_TLS_CREDS,
    OPTION_TLS_HOSTNAME,
    OPTION_TLS_AUTHZ,
    OPTION_SELINUX,
};

static const struct option long_options[] = {
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'V'},
    {"port", required_argument, NULL, 'p'},
    {"bind", required_argument, NULL, 'b'},
    {"socket", required_argument, NULL, 'k'},
    {"shared", required_argument, NULL, 'e'},
    {"persistent", no_argument, NULL, 't'},
    {"verbose", no_argument, NULL, 'v'},
    {"export-name", required_argument, NULL, 'x'},
    {"description", required_argument, NULL, 'D'},
    {"handshake-limit", required_argument, NULL, OPTION_HANDSHAKE_LIMIT},
    {"offset", required_argument, NULL, 'o'},
    {"allocation-depth", no_argument, NULL, 'A'},
    {"bitmap", required_argument, NULL, 'B'},
    {"list", no_argument, NULL, 'L'},
    {"object", required_argument, NULL, OPTION_OBJECT},
    {"tls-creds", required_argument, NULL, OPTION_TLS_CREDS},
    {"tls-authz", required_argument, NULL, OPTION_TLS_AUTHZ},
    {"tls-hostname", required_argument, NULL, OPTION_TLS_HOSTNAME},
    {"trace", required_argument, NULL, 'T'},
    {"fork", no_argument, NULL, OPTION_FORK},
    {"pid-file", required_argument, NULL, OPTION_PID_FILE},
    {"selinux-label", required_argument, NULL, OPTION_SELINUX},
    {"connect", required_argument, NULL, 'c'},
    {"disconnect", no_argument, NULL, 'd'},
    {"format", required_argument, NULL, 'f'},
    {"read-only", no_argument, NULL, 'r'},
    {"snapshot", no_argument, NULL, 's'},
    {"load-snapshot", required_argument, NULL, 'l'},
    {"nocache", no_argument, NULL, 'n'},
    {"cache", required_argument, NULL, OPTION_CACHE},
    {"aio", required_argument, NULL, OPTION_AIO},
    {"discard", required_argument, NULL, OPTION_DISCARD},
    {"detect-zeroes", required_argument, NULL, OPTION_DETECT_ZEROES},
    {"image-opts", no_argument, NULL, OPTION_IMAGE_OPTS},
    {NULL, 0, NULL, 0},
};

static void print_help(const char *program)
{
    printf("Usage: %s [OPTIONS] FILE\n"
           "  or:  %s -L [OPTIONS]\n"
           "Serve a disk image to NBD clients\n\n"
           "  -h, --help                 show this help and exit\n"
           "  -V, --version              show the version and exit\n\n"
           "Where and how it is served:\n"
           "  -p, --port=PORT            the TCP port to listen on (10809 if not said)\n"
           "  -b, --bind=HOST            the address to listen on (0.0.0.0 if not said)\n"
           "  -k, --socket=PATH          a unix socket instead\n"
           "  -e, --shared=NUM           up to NUM clients at once (1 if not said; 0: any number)\n"
           "  -t, --persistent           go on when the last client has gone\n"
           "  -x, --export-name=NAME     the name that clients ask for (empty if not said)\n"
           "  -D, --description=TEXT     what a list of exports shows\n"
           "      --handshake-limit=N    seconds in which a client has to choose (10 if not said; 0: no limit)\n"
           "      --fork                 go into the background when it is served\n"
           "      --pid-file=PATH        write the number of the process there\n"
           "  -v, --verbose              say where it is served\n\n"
           "What is served:\n"
           "  -f, --format=FMT           the format of FILE; it must be given unless -r is\n"
           "      --image-opts           FILE is a list of options: driver=...,file.filename=...\n"
           "  -r, --read-only            for reading only\n"
           "  -s, --snapshot             changes go to a temporary overlay\n"
           "  -l, --load-snapshot=WHICH  an internal snapshot, for reading: ID, NAME, snapshot.id=ID or "
           "snapshot.name=NAME\n"
           "  -o, --offset=BYTES         what lies behind so many bytes\n"
           "  -A, --allocation-depth     clients may ask how deep in the backing chain data are\n"
           "  -B, --bitmap=NAME          clients may ask where this dirty bitmap is dirty\n"
           "  -n, --nocache              without the host's cache, as --cache=none\n"
           "      --cache=MODE           none, writeback (if not said), writethrough, directsync or unsafe\n"
           "      --aio=MODE             without effect (threads, native or io_uring)\n"
           "      --discard=MODE         ignore or unmap\n"
           "      --detect-zeroes=MODE   off, on or unmap\n\n"
           "Secrets and TLS:\n"
           "      --object TYPE,id=ID... a secret, TLS credentials or an authorization\n"
           "      --tls-creds=ID         all clients have to use TLS (with -L: we do)\n"
           "      --tls-authz=ID         whom of them it lets in\n"
           "      --tls-hostname=NAME    with -L: whose certificate the server has to show\n\n"
           "  -L, --list                 list the exports of another server\n\n"
           "A listening socket that a service manager passes (LISTEN_FDS=1) takes the place of -p, -b and -k.\n",
           program, program);
}

static void print_version(const char *program)
{
    if (!strcmp(program, "qemu-nbd")) { /* those who read it look for a number of that program's */
        printf("qemu-nbd 10.0.2 (Interlock %s)\n", INTERLOCK_VERSION);
    } else {
        printf("%s version %s\n", program, INTERLOCK_VERSION);
    }
}

static int refuse(const char *option, const char *instead, struct error **err)
{
    int r = error_set(err, -ENOTSUP, "The option '%s' is not supported", option);
    if (instead) {
        error_hint(err, "%s", instead);
    }
    return r;
}

static int take_number(const char *what, const char *text, uint64_t maximum, uint64_t *ret, struct error **err)
{
    char *end;
    errno = 0;
    *ret = strtoull(text, &end, 0);
    if (!g_ascii_isdigit(*text) || *end || errno || *ret > maximum) {
        return error_set(err, -EINVAL, "Invalid %s '%s'", what, text);
    }
    return 0;
}

static int take_unsigned(const char *what, const char *text, uint64_t maximum, unsigned *ret, struct error **err)
{
    uint64_t number;
    int r = take_number(what, text, maximum, &number, err);
    *ret = r < 0 ? *ret : (unsigned)number;
    return r;
}

static int take_choice(const char *what, const char *text, const char *const *choices, struct error **err)
{
    if (!g_strv_contains(choices, text)) {
        return error_set(err, -EINVAL, "Invalid %s '%s'", what, text);
    }
    return 0;
}

static int take_cache(struct nbd_options *options, const char *mode, struct error **err)
{
    bool direct, no_flush;
    options->image.cache = mode;
    options->writethrough = !strcmp(mode, "writethrough") || !strcmp(mode, "directsync");
    return image_cache_mode(mode, &direct, &no_flush, err);
}

/* Options of the image. -ENOENT: it is none. */
static int set_image_option(struct nbd_options *options, int option, struct error **err)
{
    static const char *const aio[] = {"threads", "native", "io_uring", NULL};
    static const char *const discard[] = {"ignore", "off", "unmap", "on", NULL};
    static const char *const detect[] = {"off", "on", "unmap", NULL};
    int r;
    switch (option) {
    case 'f':
        options->image.format = optarg;
        return 0;
    case 'r':
        options->read_only = true;
        return 0;
    case 's':
        options->snapshot = true;
        return 0;
    case 'l':
        options->load_snapshot = optarg;
        return 0;
    case 'o':
        return take_number("offset", optarg, INT64_MAX, &options->offset, err);
    case 'A':
        options->allocation_depth = true;
        return 0;
    case 'B':
        options->bitmap = optarg;
        return 0;
    case 'n':
        return take_cache(options, "none", err);
    case OPTION_CACHE:
        return take_cache(options, optarg, err);
    case OPTION_AIO:
        return take_choice("aio mode", optarg, aio, err);
    case OPTION_DISCARD:
        r = take_choice("discard mode", optarg, discard, err);
        options->image.discard = !strcmp(optarg, "unmap") || !strcmp(optarg, "on") ? "unmap" : "ignore";
        return r;
    case OPTION_DETECT_ZEROES:
        options->image.detect_zeroes = optarg;
        return take_choice("detect-zeroes mode", optarg, detect, err);
    case OPTION_IMAGE_OPTS:
        options->image.image_opts = true;
        return 0;
    default:
        return -ENOENT;
    }
}

static int set_option(struct nbd_options *options, int option, struct error **err)
{
    switch (option) {
    case 'p':
        options->port = optarg;
        options->port_given = true;
        return take_unsigned("port", optarg, 65535, &(unsigned){0}, err);
    case 'b':
        options->host = optarg;
        options->host_given = true;
        return 0;
    case 'k':
        options->socket = optarg;
        return 0;
    case 'e':
        return take_unsigned("shared device number", optarg, SHARED_MAX, &options->shared, err);
    case 't':
        options->persistent = true;
        return 0;
    case 'v':
        options->verbose = true;
        return 0;
    case 'x':
        options->export_name = optarg;
        return 0;
    case 'D':
        options->description = optarg;
        return 0;
    case 'L':
        options->list = true;
        return 0;
    case OPTION_HANDSHAKE_LIMIT:
        return take_unsigned("handshake limit", optarg, UINT32_MAX, &options->handshake_seconds, err);
    case OPTION_FORK:
        options->fork = true;
        return 0;
    case OPTION_PID_FILE:
        options->pidfile = optarg;
        return 0;
    case OPTION_OBJECT:
        g_ptr_array_add(options->objects, optarg);
        return 0;
    case OPTION_TLS_CREDS:
        options->tls_creds = optarg;
        return 0;
    case OPTION_TLS_AUTHZ:
        options->tls_authz = optarg;
        return 0;
    case OPTION_TLS_HOSTNAME:
        options->tls_hostname = optarg;
        return 0;
    case 'T':
        return refuse("--trace", NULL, err);
    case OPTION_SELINUX:
        return refuse("--selinux-label", NULL, err);
    case 'c':
        return refuse("--connect",
                      "Serve the image on a socket (-t -k PATH), and let nbd-client -unix PATH make the device", err);
    case 'd':
        return refuse("--disconnect", "nbd-client -d ends a device", err);
    default:
        return error_set(err, -EINVAL, "Try '%s --help'", options->program);
    }
}

/* What goes together. */
static int check(const struct nbd_options *options, int files, struct error **err)
{
    if (options->socket && (options->port_given || options->host_given)) {
        return error_set(err, -EINVAL, "A unix socket (-k) has no port and no address (-p, -b)");
    }
    if (options->inherited && (options->socket || options->port_given || options->host_given)) {
        return error_set(err, -EINVAL, "With a socket from the service manager (LISTEN_FDS) there is no -p, -b or -k");
    }
    if (options->inherited > 1) {
        return error_set(err, -EINVAL, "The service manager passed %u sockets; one can be used", options->inherited);
    }
    if (options->list && files) {
        return error_set(err, -EINVAL, "List mode is incompatible with a file name");
    }
    if (options->list && (options->per_device || options->export_name)) {
        return error_set(err, -EINVAL, "List mode is incompatible with per-device settings");
    }
    if (!options->list && files != 1) {
        return error_set(err, -EINVAL, "Invalid number of arguments");
    }
    if (!options->list && options->tls_hostname) {
        return error_set(err, -EINVAL, "TLS hostname is only used in list mode");
    }
    if (options->tls_authz && !options->tls_creds) {
        return error_set(err, -EINVAL, "TLS authorization is not permitted without TLS credentials");
    }
    if (options->image.image_opts && options->image.format) {
        return error_set(err, -EINVAL, "--image-opts and -f are mutually exclusive");
    }
    if (options->snapshot && options->load_snapshot) {
        return error_set(err, -EINVAL, "-s and -l are mutually exclusive");
    }
    return 0;
}

static int read_options(struct nbd_options *options, int argc, char **argv, bool *ret_done, struct error **err)
{
    for (int option;
         (option = getopt_long(argc, argv, "hVp:b:k:e:tvx:D:o:AB:LT:c:df:rsl:n", long_options, NULL)) != -1;) {
        if (option == 'h' || option == 'V') {
            (option == 'h' ? print_help : print_version)(options->program);
            *ret_done = true;
            return 0;
        }
        int r = set_image_option(options, option, err);
        options->per_device = options->per_device || r != -ENOENT;
        r = r == -ENOENT ? set_option(options, option, err) : r;
        if (r < 0) {
            return r;
        }
    }
    int r = check(options, argc - optind, err);
    options->image.name = argv[optind];
    options->read_only = options->read_only || options->load_snapshot;
    options->image.writable = !options->read_only && !options->snapshot;
    return r;
}

int tool_nbd(int argc, char **argv)
{
    g_autofree char *called = g_path_get_basename(argv[0]);
    struct nbd_options options = {.program = !strcmp(called, "qemu-nbd") ? "qemu-nbd" : "interlock nbd",
                                  .host = "0.0.0.0",
                                  .port = "10809",
                                  .shared = 1,
                                  .handshake_seconds = 10,
                                  .objects = g_ptr_array_new()};
    struct error *error = NULL;
    bool done = false;
    argv[0] = (char *)options.program; /* getopt_long() puts it before what it has to say */
    int status = activation_take(&options.inherited, &error);
    status = status < 0 ? status : read_options(&options, argc, argv, &done, &error);
    if (status < 0) {
        status = tool_fail(options.program, error);
    } else if (!done) {
        status = options.list ? nbd_list(&options) : nbd_serve(&options);
    }
    g_ptr_array_free(options.objects, TRUE);
    return status;
}
