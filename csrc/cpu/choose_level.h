// Which SIMD level runs, for module.cpp. The kernels themselves are reached through kernels() in cpu/kernels.h.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace ft {

// Levels that were built and that this CPU has, best first.
std::vector<std::string> available_levels();

// "auto" or one of available_levels(); false (and no change) for anything else.
bool set_level(const std::string& level);

}  // namespace ft
