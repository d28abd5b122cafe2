# Finds the PyTorch of Python_EXECUTABLE and defines Torch::Torch, Torch_VERSION and Torch_CUDA ("none", "13.0", ...).
#
# It stands in for the package file that torch ships because that one, in a CUDA wheel, stops unless a complete CUDA
# toolkit (cuBLAS, cuRAND, NVRTC, ...) is installed, even for a library like this one that needs only torch's C++ half.
# Nothing is imported and no GPU is asked: torch/version.py says everything.

set(_torch_query [[
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("no torch in " + sys.executable)
root = pathlib.Path(spec.origin).parent
version = runpy.run_path(str(root / "version.py"))
print(root, version["__version__"], version.get("cuda") or "none", sep=";", end="")
]])
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "${_torch_query}"
  OUTPUT_VARIABLE _torch_answer
  ERROR_VARIABLE _torch_error
  RESULT_VARIABLE _torch_result)

if(_torch_result EQUAL 0)
  list(GET _torch_answer 0 Torch_ROOT_DIR)
  list(GET _torch_answer 1 Torch_VERSION)
  list(GET _torch_answer 2 Torch_CUDA)
  set(_torch_libraries)
  foreach(_name c10 torch_cpu torch_python)
    # NO_CACHE: a build directory may outlive the environment that it was configured in.
    find_library(_torch_library_${_name} ${_name} PATHS ${Torch_ROOT_DIR}/lib NO_DEFAULT_PATH NO_CACHE)
    list(APPEND _torch_libraries ${_torch_library_${_name}})
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Torch
  REQUIRED_VARS Torch_ROOT_DIR _torch_library_c10 _torch_library_torch_cpu _torch_library_torch_python
  VERSION_VAR Torch_VERSION
  REASON_FAILURE_MESSAGE "${_torch_error}")

if(Torch_FOUND AND NOT TARGET Torch::Torch)
  add_library(Torch::Torch INTERFACE IMPORTED)
  target_link_libraries(Torch::Torch INTERFACE ${_torch_libraries})
  # torch ships the pybind11 headers that its own bindings were built with: no second copy, no mixed versions.
  target_include_directories(Torch::Torch SYSTEM INTERFACE ${Torch_ROOT_DIR}/include
                                                           ${Torch_ROOT_DIR}/include/torch/csrc/api/include)
  target_compile_features(Torch::Torch INTERFACE cxx_std_20)
endif()
