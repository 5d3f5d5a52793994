"""What the methods share: their form, the choice by scores, statistics of inputs, running block by block."""
