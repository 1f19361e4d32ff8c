// The engine on LiteRT. app/build.gradle.kts: implementation("com.google.ai.edge.litert:litert:2.3.0") or newer.
// For a GPU or NPU choose another Accelerator, and run check() again: its arithmetic is another one.
package ondevice

import android.content.Context
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel

class Engine(context: Context, private val facts: Facts) : AutoCloseable {
    private val model = CompiledModel.create(context.assets, "model/${facts.file}", CompiledModel.Options(Accelerator.CPU))
    private val inputs = model.createInputBuffers()
    private val outputs = model.createOutputBuffers()

    fun infer(feeds: Map<String, FloatArray>): Map<String, FloatArray> {
        facts.inputs.forEachIndexed { i, port -> inputs[i].writeFloat(feeds.getValue(port.name)) }
        model.run(inputs, outputs)
        return facts.outputs.mapIndexed { i, port -> port.name to outputs[i].readFloat() }.toMap()
    }

    override fun close() = model.close()
}
