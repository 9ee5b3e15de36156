#include <cblas.h>

#include "core/sound.h"
