"""What turns logits into text. Plain computation: nothing here waits, sleeps or reads a clock."""
