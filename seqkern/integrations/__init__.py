"""seqkern inside other libraries. Each module needs its library; none is imported before it is asked for."""
