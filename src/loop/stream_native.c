/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sockets of the real engines; their functions arrive with the next change. */
#include "loop/engine.h"

const struct stream_ops stream_native_ops;
