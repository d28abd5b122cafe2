"""Training on top of the layers: from a task's data to its figures, in one process or many.

commands      python -m seqkern train, evaluate, predict, translate, generate, attention, tsne
recipes       one file for each task: config, data, model, loss, figures
trainer       the loop that they share; with config, batches, optim, checkpoint, distributed, log, progress
metrics       accuracy, F1, entities' F1, perplexity, BLEU;  plots: attention, t-SNE
tbptt         truncated backpropagation through time for any recurrent layer
demo, verify  the commands of these names; compare: seqkern beside torch.nn on the same inputs

A user of the layers, like any program outside this package: `import seqkern` never imports it.
"""
