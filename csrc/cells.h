// What every cell is like from outside: one table for the torch sides, the checks and the kernels.
// Its gates are in cell.h.
#pragma once

#include <cstddef>

namespace seqkern {

enum class CellKind {
  rnn_tanh,
  rnn_relu,
  gru,
  lstm,
  peephole_lstm,
  cifg_lstm,
  gru_reset_before,
  mgu,
  indrnn_tanh,
  indrnn_relu,
  nested_lstm,
  nested_gru,
  slstm,
  layer_norm_lstm,
  layer_norm_gru,
};

constexpr int kMostOwn = 6;     // parameters of its own that a cell has
constexpr int kMostStates = 4;  // h among them

// A cell makes its gates of W_ih x and W_hh h, and some of a second product within the step:
//   one product   pre[slot] = W_ih's + W_hh's; a slot may have a part of one of them only
//   mid > 0       the gates of the first product make `mid` vectors of H (r h_prev, say), which the
//                 rest of W_hh's gates, or an inner cell's two matrices, are multiplied by
//   rows          the products are normalised over a whole row before they are gates
struct CellShape {
  const char* name;
  int input_gates;     // W_ih is [input_gates*H, I]
  int hidden_gates;    // W_hh is [hidden_gates*H, P]; 0: a vector [H]
  int outer_slots;     // pre-activations of W_ih, W_hh: W_ih's gates in the first slots, W_hh's in
                       // the last; where they overlap the products are added
  int rotation;        // the gate of W_ih in slot 0 (a GRU's are n r z n': x to n r z, h to r z n')
  int slots;           // in all: gradients of pre-activations that backward makes
  int saved;           // values per unit that backward wants back
  int states;          // h, c, ...
  int first_gates;     // of W_hh, multiplied by h; the rest by mid
  int mid, mid_slots;  // see above; slots that the second product has a part in
  bool rows;           // normalised over rows
  bool saves_h;        // backward reads the h that the cell made
  int own;             // parameters of its own: of these sizes, in H (0: [*, H])
  int own_gates[kMostOwn];
  int sums;  // gradients per unit that are summed over all rows, for own parameters; of normalised
             // rows: of pre-activations before gain and bias, of a GRU's W_hn h, of the normalised
             // c
};

// In the order of CellKind.
constexpr CellShape kCellShapes[] = {
    // name             in hid out rot slots saved states first mid slots rows   saves_h
    {"rnn_tanh", 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, false, true, 0, {}, 0},
    {"rnn_relu", 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, false, true, 0, {}, 0},
    {"gru", 3, 3, 4, 2, 4, 4, 1, 3, 0, 0, false, false, 0, {}, 0},
    {"lstm", 4, 4, 4, 0, 4, 5, 2, 4, 0, 0, false, false, 0, {}, 0},
    {"peephole_lstm", 4, 4, 4, 0, 4, 5, 2, 4, 0, 0, false, false, 1, {3}, 3},
    {"cifg_lstm", 3, 3, 3, 0, 3, 4, 2, 3, 0, 0, false, false, 0, {}, 0},
    {"gru_reset_before", 3, 3, 3, 0, 3, 3, 1, 2, 1, 1, false, false, 0, {}, 0},
    {"mgu", 2, 2, 2, 0, 2, 2, 1, 1, 1, 1, false, false, 0, {}, 0},
    {"indrnn_tanh", 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, false, true, 0, {}, 1},
    {"indrnn_relu", 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, false, true, 0, {}, 1},
    {"nested_lstm", 4, 4, 4, 0, 8, 10, 3, 4, 2, 4, false, false, 4, {0, 0, 4, 4}, 0},
    {"nested_gru", 3, 3, 4, 2, 8, 8, 1, 3, 2, 4, false, false, 4, {0, 0, 3, 3}, 0},
    {"slstm", 4, 4, 4, 0, 4, 8, 4, 4, 0, 0, false, false, 0, {}, 0},
    {"layer_norm_lstm", 4, 4, 4, 0, 8, 14, 2, 4, 0, 0, true, false, 6, {4, 4, 4, 4, 1, 1}, 5},
    {"layer_norm_gru", 3, 3, 3, 0, 6, 10, 1, 3, 0, 0, true, false, 4, {3, 3, 3, 3}, 4},
};
constexpr int kCells = int(sizeof(kCellShapes) / sizeof(kCellShapes[0]));

constexpr const CellShape& cell_shape(CellKind cell) { return kCellShapes[int(cell)]; }

// A normalised row's statistics lie beside its saved values, as float or double: this many of the
// reserve's elements, of at least two bytes each.
constexpr int kStatisticsElements = 32;

// Values per unit that are kept for backward. Regularisers want more: the states that are carried
// on, which are not the ones that the cell has made, and h itself, if backward reads it.
constexpr int saved_values(const CellShape& shape, bool regularised) {
  return shape.saved + (regularised ? shape.states - 1 + int(shape.saves_h) : 0);
}

}  // namespace seqkern
