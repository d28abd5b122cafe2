"""The reference models: the classic sequence tutorials' modules on seqkern's layers."""
