#include "loop/engine.h"
const struct stream_ops stream_native_ops;
