// The paired layout: dword [k / 2][row] holds elements k and k + 1 of 16 rows.
//
// It is what AMX wants of its second operand, and one in which 16 rows take part in a vector
// operation, each in its own lane.
#pragma once
#include "matrix.h"

// 16 rows of `width` elements, and zeros up to the next multiple of kPad; a null row is zeros.
inline void pair_rows(const bf16* const rows[kRows], int width, bf16* paired) {
  constexpr int kElements = 2 * kLanes;
  for (int m = 0; m < kRows; m += kLanes)
    for (int k = 0; k < padded(width); k += kElements) {
      Int r[kLanes] = {};
      for (int i = 0; i < kLanes; i++) {
        if (!rows[m + i]) continue;
        if (k + kElements <= width)
          memcpy(&r[i], rows[m + i] + k, sizeof r[i]);
        else if (k < width)
          memcpy(&r[i], rows[m + i] + k, size_t(width - k) * 2);
      }
      transpose(r);
      for (int i = 0; i < kLanes; i++)
        memcpy(paired + (k / 2 + i) * 2 * kRows + 2 * m, &r[i], sizeof r[i]);
    }
}
