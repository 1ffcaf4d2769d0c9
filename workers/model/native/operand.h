// Rows of activations, in every form that products with some matrices take them in.
//
// Invariant: a form of a row depends on that row alone, and is padded with zeros as the row is. Knows
// neither who has room for the forms nor which thread arranges which rows.
#pragma once
#include "instruction_set.h"
#include "packed.h"
#include "paired.h"

namespace {

// Room for what rows become. Null: no product of this decoder takes that form.
struct Forms {
  float* widened = nullptr;   // [num_rows][padded(width)]
  bf16* paired = nullptr;     // blocks of 16 rows
  char* shortened = nullptr;  // rows in 8 bits
};

inline void widen(const bf16* from, int width, float* to) {
  for (int k = 0; k < padded(width); k += kLanes) store(to + k, load16(from + k));
}

struct Operand {
  const bf16* rows;
  int64_t stride;
  int width;
  Forms forms;

  // For products with `linear`.
  Operand(const bf16* rows, int64_t stride, const Linear& linear, const Forms& room)
      : rows(rows), stride(stride), width(linear.width), forms(room) {
    if (!any_packed(linear)) forms.shortened = nullptr;
  }

  // Fill the forms of rows [begin, end); `begin` is the first of a block.
  void arrange(int begin, int end) const {
    if (forms.shortened)
      for (int row = begin; row < end; row++)
        shorten(rows + row * stride, width, shortened_row(row));
    if constexpr (kWidens)
      for (int row = begin; row < end; row++)
        widen(rows + row * stride, width, forms.widened + int64_t(row) * padded(width));
    if constexpr (kHasTiles)
      for (int row = begin; row < end; row += kRows) {
        const bf16* block[kRows] = {};
        for (int m = 0; m < kRows && row + m < end; m++) block[m] = rows + (row + m) * stride;
        pair_rows(block, width, paired_block(row));
      }
  }

  const Vectors::Element* row(int index) const {
    if constexpr (kWidens)
      return (const Vectors::Element*)(forms.widened + int64_t(index) * padded(width));
    else
      return (const Vectors::Element*)(rows + index * stride);
  }
  // The block whose first row that is.
  bf16* paired_block(int first) const { return forms.paired + int64_t(first) * padded(width); }
  char* shortened_row(int index) const {
    return forms.shortened + index * Shortened::bytes(width);
  }

  void block(int first, int num_rows, Block<Vectors::Element>& to) const {
    to.num_rows = num_rows;
    for (int m = 0; m < num_rows; m++) to.rows[m] = row(first + m);
    to.paired = forms.paired ? paired_block(first) : nullptr;
  }
  void block(int first, int num_rows, ShortBlock& to) const {
    to.num_rows = num_rows;
    for (int m = 0; m < num_rows; m++) to.rows[m] = Shortened(shortened_row(first + m), width);
  }
};

}  // namespace
