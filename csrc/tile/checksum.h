// CRC-32 of files, the one of zlib and PNG.
#pragma once
#include <cstdint>

namespace uk {

// Of `size` more bytes, where what came before has the checksum `crc` (0 for nothing).
uint32_t crc32(const uint8_t* bytes, int64_t size, uint32_t crc);

}  // namespace uk
