// The pybind11 module fasttransfer._C. Importing it registers the CPU kernels with torch's dispatcher (`import
// torch` must come first); the functions here only tell and choose the SIMD level.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/choose_level.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fasttransfer";
  m.def("simd_level", [] { return std::string(ft::kernels().level); }, "The SIMD level in force.");
  m.def("simd_levels", &ft::available_levels, "Levels that were built and that this CPU has, best first.");
  m.def("set_simd_level", &ft::set_level, py::arg("level"),
        "Choose a level by name, or 'auto'; returns False and changes nothing where it is not available.");
}
