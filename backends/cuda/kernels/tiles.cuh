// Access to a tiled weight (layout in weights.py). BITS is 4 or 8, GROUP 32, 64 or 128.
#pragma once

constexpr int LOADS = BITS / 2;                     // 16-byte loads per lane and unit (16 rows x 128 inputs)
constexpr int GROUPS = 128 / GROUP;                 // groups in a unit
constexpr int OFFSET = 1024;                        // offset of a code in a half before conversion: rows 0..7
constexpr int OFFSET_HIGH = BITS == 4 ? 64 : 1024;  // and rows 8..15

// The A operand of mma (c, j) of a unit: a[2p + r] = halves OFFSET + q. With a half's exponent 2^10 the low four bits
// of the mantissa count ones; with 2^6 bits 4..7 do. So every other nibble needs no shift.
DEVICE void operand(u32 (&a)[4], const uint4* unit, int c, int j) {
  if constexpr (BITS == 4) {
    const uint4& v = unit[c / 2];
    u32 w = c % 2 ? (j ? v.w : v.z) : (j ? v.y : v.x);
    a[0] = (w & 0x000f000fu) | 0x64006400u;
    a[1] = (w & 0x00f000f0u) | 0x54005400u;
    w >>= 8;
    a[2] = (w & 0x000f000fu) | 0x64006400u;
    a[3] = (w & 0x00f000f0u) | 0x54005400u;
  } else {
    u32 top = j ? unit[c].z : unit[c].x, bottom = j ? unit[c].w : unit[c].y;
    a[0] = bytes(top, 0x64646464u, 0x4140);
    a[1] = bytes(bottom, 0x64646464u, 0x4140);
    a[2] = bytes(top, 0x64646464u, 0x4342);
    a[3] = bytes(bottom, 0x64646464u, 0x4342);
  }
}

DEVICE size_t unit_at(int tile, int unit, int units) {
  return (size_t(tile) * units + unit) * (LOADS * 32);
}
DEVICE size_t group_at(int tile, int group, int units) {
  return (size_t(tile) * units * GROUPS + group) * 8;
}
