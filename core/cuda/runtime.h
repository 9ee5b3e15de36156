#pragma once
// What core/ asks of the CUDA runtime. Exists in builds with CUDA alone; nothing of CUDA shows in this header.
#include <cstddef>
#include <string>

#include "core/device_queue.h"

namespace tforge::cuda {

Devices devices();
std::string id_of(int number);
/// What kind of device the process uses: two of the same kind give the same bits.
std::string kind_of_device();

/// Makes device `number` that of the process. Throws DeviceError.
void* create_stream(int number);
void destroy_stream(void* native);
void wait(const Stream& stream);
WaitWatch* set_wait_watch(WaitWatch* watch);

/// Null when there is no memory left.
void* allocate(std::size_t bytes);
void* allocate_pinned(std::size_t bytes);
/// Waits for what the device still does with it.
void release(void* device_memory);
void release_pinned(void* host_memory);
/// Whether memory of the host is.
bool is_pinned(const void* host_memory);

/// Queues zeros, in one run or in rows.
void zero(const Stream& stream, void* to, std::size_t bytes);
void zero(const Stream& stream, void* to, std::size_t pitch, std::size_t row_bytes, std::size_t rows);
/// Queues a copy of `rows` rows of `row_bytes` bytes, on any side of the bus. Host memory must stay as it is until the
/// queue has got there.
void copy(const Stream& stream, const void* from, std::size_t from_pitch, void* to, std::size_t to_pitch,
          std::size_t row_bytes, std::size_t rows);

/// Throws DeviceError ("what: the runtime's text") unless `status`, a cudaError_t, is success.
void check(int status, const char* what);

}  // namespace tforge::cuda
